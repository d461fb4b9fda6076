"""Speculative decoding by hand: the draft is what followed the last two tokens before. It equals plain greedy."""

import sys

import minerva_native as mn

N_DRAFT, N_TOKENS = 6, 150

with mn.Model.load(sys.argv[1] if len(sys.argv) > 1 else mn.DEMO_PATH) as model, model.context(n_ctx=1024) as ctx:
    seq = ctx.sequence()
    seq.extend(model.tokenizer.encode("Once upon a time, there was a little cat. One cold day,"))
    start, passes, logits = len(seq), 0, seq.logits
    while len(seq) < start + N_TOKENS and not model.tokenizer.is_end(token := int(logits.argmax())):
        known = [*seq, token]
        at = next((i for i in range(len(known) - 3, 0, -1) if known[i - 1 : i + 1] == known[-2:]), len(known))
        rows = seq.logits_after([token, *known[at + 1 : at + 1 + N_DRAFT]])[1:]  # one pass verifies the draft
        right = 0
        while right < len(rows) - 1 and rows[right].argmax() == seq[len(known) + right]:
            right += 1
        seq.truncate(len(known) + right)
        logits, passes = rows[right], passes + 1
    print(model.tokenizer.decode(seq[start : start + N_TOKENS]))
    print(f"[{len(seq) - start} tokens in {passes} passes]")
