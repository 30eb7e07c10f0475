"""One attempt's life on the host: request, session, stage, run, admit, record, destroy."""
