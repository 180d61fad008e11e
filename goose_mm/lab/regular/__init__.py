"""Regular expressions and automata, compiled into the weights of RWKV-7 layers."""
