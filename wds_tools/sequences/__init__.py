"""Samples -> token sequences -> rows of one length. Pure but for the text tokenizer's files; numpy, no torch.

    Sample ──build──▶ Example (ids, loss) ──pack──▶ Row (max_length ids, loss, segments) ──rows──▶ members of a shard, batches
              ▲ tokenizer, vocabulary, prompts, choices

What a sample becomes is a function of (config, seed, epoch, sample): see docs/training.md.
"""
