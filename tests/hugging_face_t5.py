"""A random T5 of Hugging Face: its weights, logits and greedy tokens, in a process of its own.

    python tests/hugging_face_t5.py REQUEST.npz ANSWER.npz

A process of its own, because the Triton that comes with torch's CUDA build and TensorFlow crash
each other (segmentation fault at `import triton`, torch 2.13 and TensorFlow 2.21), and the other
tests of a worker import TensorFlow.

REQUEST holds `config` (the JSON of a transformers.T5Config), encoder_input_tokens and
decoder_input_tokens ([batch, length] int32). ANSWER holds every weight under its torch name,
`logits` [batch, target length, vocab] float32 and `tokens` [batch, at most 10] int.
"""

import json
import sys

import numpy as np
import torch
import transformers


def main(request_path: str, answer_path: str):
    request = np.load(request_path)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.T5Config(**json.loads(str(request["config"])))
    model = transformers.T5ForConditionalGeneration(config).eval()
    inputs = torch.tensor(request["encoder_input_tokens"], dtype=torch.long)
    targets = torch.tensor(request["decoder_input_tokens"], dtype=torch.long)
    mask = (inputs > 0).long()
    with torch.no_grad():
        for parameter in model.parameters():  # weights of a size at which mistakes show
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        logits = model(input_ids=inputs, attention_mask=mask, decoder_input_ids=targets).logits
        # use_cache=False: with a cache transformers 5.23 fails for stacks of unequal depth.
        tokens = model.generate(
            input_ids=inputs, attention_mask=mask, max_new_tokens=10, do_sample=False,
            num_beams=1, eos_token_id=1, pad_token_id=0, use_cache=False,
        )  # fmt: skip
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(answer_path, logits=logits.numpy(), tokens=tokens.numpy()[:, 1:], **weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
