"""Publishing: the card, what may be published, the upload, and checking what was pulled."""
