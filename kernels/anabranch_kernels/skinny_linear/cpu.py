from .reference import skinny_linear
