"""Our models inside two evaluation harnesses, lm-eval and lmms-eval."""
