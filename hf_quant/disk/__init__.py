"""Files that survive a crash and are checked before they are trusted, and the memory of this machine.

Nothing here knows what a file is about: no scheme, no model, no format."""
