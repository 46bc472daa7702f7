"""One module a source format, each a generator of records and problems."""
