"""The checks between what came out of a sandbox and the datastore.

Everything in here reads hostile bytes. It unpickles nothing and imports nothing
that these name, follows no path of theirs, and bounds every size before it
allocates. What is wrong raises `Rejected`, and then nothing at all is recorded.

    text.py       output and other text, made harmless for terminals and logs
    results.py    the archive of an attempt: data.json, blobs, cards
    reader.py     reads what follows here, in a process that can be ended
    claims.py     data.json: what the step says that it recorded
    blobs.py      the content of a blob, held against its key
    internals.py  what the scheduler acts on, derived or checked, and written anew
    artifacts.py  the user's artifacts: kept, inherited or tainted
    cards.py      HTML that gets none of its viewer's rights
"""
