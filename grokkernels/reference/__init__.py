"""The mathematics: each op in plain PyTorch, differentiated by autograd. The oracle of every other backend."""
