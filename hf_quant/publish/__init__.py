"""Publishing: the card, what may be published, the upload, and checking what was pulled.

Nothing here measures or quantizes; it reads what the other folders have written down."""
