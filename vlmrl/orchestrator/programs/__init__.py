"""Programs of the user's that play rollouts through the chat endpoint."""
