"""The command `kvcompress`: what the pipeline does, for one model and without DVC."""
