"""`mode=play`: play episodes without a model, and see what the policy would see."""
