"""How the frameworks of the original files spell the weights of common layers, as lists of rules."""
