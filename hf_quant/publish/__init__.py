"""Publishing: the model card, checks of what may be published, the upload, and checks of what was downloaded.

Nothing here measures or quantizes; all facts come from the files that other folders have written."""
