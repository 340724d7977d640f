"""`task=dataset`: problems from files of questions, pictures and answers."""
