"""Learning from logged answers: APA, AWR and ILQL without sampling."""
