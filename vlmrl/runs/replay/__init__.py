"""`mode=replay`: a recorded batch through today's code."""
