"""Images: what a checkpoint expects of them (`pixels`) and where they come from (`pipeline`). Texts: their tokens (`text`)."""
