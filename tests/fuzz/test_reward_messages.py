"""What reward servers and their clients send each other: rewards, or one line."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import strategies as st

from alignment.ppo.reward_server import _Refused, parse_request
from alignment.ppo.rewards import RewardBatch
from alignment.ppo.rewards.base import check_rewards
from alignment.ppo.rewards.server import _decode, _encode, _TryAgain
from alignment.runtime.faults import RunError
from tests.fuzz.campaign import assert_one_line, fuzz
from tests.fuzz.documents import DEEP, VALUES, changed, damaged, dump

REQUEST = {"prompts": ["p", "q"], "responses": ["r", "s"], "finished": [True, False], "samples": [{}, {"input": "p"}]}
requests = changed(st.just(REQUEST), st.sampled_from(sorted(REQUEST)))
replies = changed(st.just({"rewards": [1.0, 2]}), st.just("rewards"))


@fuzz(100, 1500, content=damaged(requests.map(dump) | VALUES.map(dump) | DEEP) | st.binary(max_size=99))
def requests_to_the_server(content):
    try:
        batch = parse_request(content)
    except _Refused as refused:
        assert refused.status == 400
        assert_one_line(refused)
    else:
        assert isinstance(batch, RewardBatch) and json.loads(_encode(batch))["responses"] == batch.responses


@fuzz(100, 1500, content=damaged(replies.map(dump) | VALUES.map(dump) | DEEP) | st.binary(max_size=99))
def replies_of_the_server(content):
    try:
        rewards = check_rewards(_decode(content), 2, "it")
    except (RunError, _TryAgain) as fault:
        assert_one_line(fault)
    else:
        assert rewards.dtype == np.float32 and rewards.shape == (2,) and np.isfinite(rewards).all()


test_requests, test_requests_full = requests_to_the_server
test_replies, test_replies_full = replies_of_the_server
