"""The chat endpoint: foreign programs talk to the policy as to an OpenAI-style server, and what it sampled for them
becomes turns of an ordinary rollout.

    program ─ POST /session/<id>/v1/chat/completions ─▶ server.py ─▶ request.py: JSON ─▶ ChatRequest
                                                            │
       JSON or SSE ◀─ answers.py ◀─ ChatAnswer ◀─ session.py: bridged from the sampled ids, or a new branch
                                                            │ close()
                                                            └─▶ turns, ordered by branch

    refusal.py        what a client is told when its request is not served
    images.py         data URLs, decoded once per distinct image
    conversation.py   when two conversations are equal
    branches.py       from requests to the branches of a rollout
"""
