"""Runs in the Python of `make peers`: what llama.cpp makes of texts and tokens.

Reads lines of JSON, answers each with one. `{"open": path}` opens a vocabulary and describes it;
`{"tokenize": [[text, add_special, parse_special], ...]}` gives lists of token ids;
`{"pieces": [ids]}` the bytes of each token, in hexadecimal, as control tokens shown and hidden.
"""

import ctypes
import importlib
import json
import sys

llama_cpp = importlib.import_module("llama_cpp")  # not in the Python that checks types

_quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)


class Peer:
    def open(self, path):
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not model:
            return {"error": "llama.cpp refuses the file"}
        self.vocab = vocab = llama_cpp.llama_model_get_vocab(model)
        count = llama_cpp.llama_vocab_n_tokens(vocab)
        ids = range(count)
        return {
            "size": count,
            "end": [i for i in ids if llama_cpp.llama_vocab_is_eog(vocab, i)],
            "control": [i for i in ids if llama_cpp.llama_vocab_is_control(vocab, i)],
            "bos": llama_cpp.llama_vocab_bos(vocab),
            "eos": llama_cpp.llama_vocab_eos(vocab),
            "adds_bos": llama_cpp.llama_vocab_get_add_bos(vocab),
            "adds_eos": llama_cpp.llama_vocab_get_add_eos(vocab),
        }

    def tokenize(self, rows):
        return [self._tokenize(*row) for row in rows]

    def _tokenize(self, text, add_special, parse_special):
        data = text.encode()
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(
            self.vocab, data, len(data), buffer, room, add_special, parse_special
        )
        assert 0 <= count <= room, count
        return buffer[:count]

    def pieces(self, token_ids):
        return [[self._piece(token_id, shown) for shown in (True, False)] for token_id in token_ids]

    def _piece(self, token_id, is_shown):
        buffer = ctypes.create_string_buffer(4096)
        count = llama_cpp.llama_token_to_piece(self.vocab, token_id, buffer, 4096, 0, is_shown)
        assert 0 <= count <= 4096, count
        return buffer.raw[:count].hex()


def main():
    llama_cpp.llama_log_set(_quiet, None)
    llama_cpp.llama_backend_init()
    peer = Peer()
    for line in sys.stdin:
        ((name, value),) = json.loads(line).items()
        print(json.dumps(getattr(peer, name)(value)), flush=True)


main()
