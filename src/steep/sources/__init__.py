"""Raw text into documents: one file per format."""
