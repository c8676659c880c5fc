"""Golden vectors: what an implementation in any language can test itself against, without Python.

Read it in this order: inputs (which model, which tokens) → plain (formulas without torch) → constants (with their
three tables) → record (what one forward is asked) → tolerances (measured by measure) → vectors → manifest → export →
compare → cli.
`docs/golden.md` is the page for those who use the files.
"""
