// A model's own MTP head, in a context of its own, which does what the decoder that it drafts for does.
//
// At each position of a sequence it has a token and the hidden state after the token before. None of these functions
// throws: what fails in the head's context ends its guesses, and nothing else.
#ifndef MINERVA_HEAD_H
#define MINERVA_HEAD_H

#include "failure.h"

#include <unordered_map>
#include <vector>

namespace minerva {

// The hidden states after the last tokens of a sequence, as far as they are known.
class States {
  public:
    // The state after the token before a position, or a null pointer.
    const float * before(int32_t position, size_t width) const;
    void put(int32_t position, const float * state, size_t width);
    void cut(int32_t position);  // forgets those of tokens from this position on

  private:
    int32_t first_ = 0;  // the positions that are known: from here
    int32_t end_ = 0;    // to before here
    std::vector<float> rows_;
};

}  // namespace minerva

struct minerva_head {
    minerva_decoder decoder = {};  // of the head's context
    int32_t n_layers = 1;          // heads, of which the i-th drafts the i-th token
    size_t width = 0;              // numbers of a hidden state
    std::unordered_map<int32_t, minerva::States> states;  // by sequence id
    std::vector<float> rows;                              // of a batch
};

namespace minerva {

// After a batch was evaluated: the head reads the same tokens, with the hidden states that came of it.
void follow(minerva_decoder * decoder, const llama_batch & batch);

// `minerva_head_copy` is in hooks.h.
void head_forget(minerva_decoder * decoder, int32_t sequence_id, int32_t start, int32_t stop);
void head_clear(minerva_decoder * decoder);

}  // namespace minerva

#endif
