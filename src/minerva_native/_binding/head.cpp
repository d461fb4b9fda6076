#include "head.h"

#include <llama-ext.h>

#include <algorithm>
#include <cstring>
#include <memory>

using minerva::guarded;
using minerva::States;

namespace {

// A guess and the token before it, and the state before that, which the next guess needs if all of this one is wrong.
constexpr int32_t n_kept = MINERVA_MOST_DRAFTED + 2;

// Whether there is a head that can compute.
bool has_head(const minerva_decoder * decoder) {
    return decoder->head != nullptr && !decoder->head->decoder.failed;
}

// Call with the head what may fail in its context.
template <class Work> bool done(minerva_head & head, Work work) {
    return guarded<int32_t>(MINERVA_THREW, &head.decoder, true, [&] {
               work(llama_get_memory(head.decoder.context));
               minerva::rest(&head.decoder);
               return 0;
           }) == 0;
}

// Have a sequence end before a position, or be empty if its tokens would not be consecutive: libllama demands that.
void end_before(llama_memory_t memory, int32_t sequence_id, int32_t position) {
    llama_memory_seq_rm(memory, sequence_id, position, -1);
    const int32_t last = llama_memory_seq_pos_max(memory, sequence_id);
    if (last >= 0 && last != position - 1) {
        llama_memory_seq_rm(memory, sequence_id, -1, -1);
    }
}

// A batch of tokens with a hidden state each.
class Batch {
  public:
    explicit Batch(minerva_head & head) : head_(head) { head_.rows.clear(); }

    void add(int32_t token, int32_t position, int32_t sequence_id, bool is_output, const float * state) {
        tokens_.push_back(token);
        positions_.push_back(position);
        ids_.push_back(sequence_id);
        outputs_.push_back(is_output);
        if (state != nullptr) {
            head_.rows.insert(head_.rows.end(), state, state + head_.width);
        } else {
            head_.rows.resize(head_.rows.size() + head_.width);
        }
    }

    // What `llama_decode` returns, by the heads from `first` to `last`: each rewrites what the one before has evaluated.
    int32_t decode(llama_memory_t memory, int32_t first, int32_t last) {
        const size_t count = tokens_.size();
        std::vector<int32_t> sizes(count, 1);
        std::vector<int32_t *> of_each(count);
        for (size_t index = 0; index < count; ++index) {
            of_each[index] = &ids_[index];
        }
        llama_batch batch = {};
        batch.n_tokens = int32_t(count);
        batch.token = tokens_.data();
        batch.embd = head_.rows.data();
        batch.pos = positions_.data();
        batch.n_seq_id = sizes.data();
        batch.seq_id = of_each.data();
        batch.logits = outputs_.data();
        int32_t code = 0;
        minerva::wake(&head_.decoder);
        for (int32_t layer = first; layer <= last && code == 0; ++layer) {
            for (size_t index = 0; index < count; ++index) {
                if (index == 0 || ids_[index] != ids_[index - 1]) {
                    end_before(memory, ids_[index], positions_[index]);
                }
            }
            if (head_.n_layers > 1) {
                llama_set_nextn_layer_offset(head_.decoder.context, layer);
            }
            code = llama_decode(head_.decoder.context, batch);
        }
        return code;
    }

  private:
    minerva_head & head_;
    std::vector<int32_t> tokens_, positions_, ids_;
    std::vector<int8_t> outputs_;
};

int32_t most_likely(const float * logits, int32_t n_vocab) {
    return int32_t(std::max_element(logits, logits + n_vocab) - logits);
}

}  // namespace

const float * States::before(int32_t position, size_t width) const {
    const int32_t wanted = position - 1;
    return first_ <= wanted && wanted < end_ ? rows_.data() + size_t(wanted % n_kept) * width : nullptr;
}

void States::put(int32_t position, const float * state, size_t width) {
    if (position != end_) {
        first_ = position;
    }
    end_ = position + 1;
    first_ = std::max(first_, end_ - n_kept);
    rows_.resize(n_kept * width);
    std::memcpy(rows_.data() + size_t(position % n_kept) * width, state, width * sizeof(float));
}

void States::cut(int32_t position) {
    end_ = std::min(end_, std::max(position, 0));
    first_ = std::min(first_, end_);
}

void minerva::follow(minerva_decoder * decoder, const llama_batch & batch) {
    if (!has_head(decoder)) {
        return;
    }
    minerva_head & head = *decoder->head;
    const float * states = llama_get_embeddings_nextn(decoder->context);
    if (states == nullptr) {
        return;
    }
    const auto id = [&](int32_t index) { return batch.seq_id[index][0]; };
    rest(decoder);
    done(head, [&](llama_memory_t memory) {
        Batch read(head);
        for (int32_t index = 0; index < batch.n_tokens; ++index) {
            const bool is_first = index == 0 || id(index) != id(index - 1);
            const float * before = is_first ? head.states[id(index)].before(batch.pos[index], head.width)
                                            : states + size_t(index - 1) * head.width;
            read.add(batch.token[index], batch.pos[index], id(index), false, before);
        }
        read.decode(memory, 0, head.n_layers - 1);
        for (int32_t index = 0; index < batch.n_tokens; ++index) {
            head.states[id(index)].put(batch.pos[index], states + size_t(index) * head.width, head.width);
        }
    });
}

void minerva::head_forget(minerva_decoder * decoder, int32_t sequence_id, int32_t start, int32_t stop) {
    if (!has_head(decoder)) {
        return;
    }
    // Of what is taken out of the middle nothing is kept: what came after it is moved, or there no more.
    const int32_t from = stop < 0 ? std::max(start, 0) : 0;
    minerva_head & head = *decoder->head;
    const auto known = head.states.find(sequence_id);
    if (known != head.states.end()) {
        known->second.cut(from);
    }
    done(head, [&](llama_memory_t memory) { llama_memory_seq_rm(memory, sequence_id, from, -1); });
}

void minerva::head_clear(minerva_decoder * decoder) {
    if (!has_head(decoder)) {
        return;
    }
    decoder->head->states.clear();
    done(*decoder->head, [&](llama_memory_t memory) { llama_memory_clear(memory, true); });
}

int32_t minerva_head_new(minerva_decoder * decoder, struct llama_context * context) {
    return guarded<int32_t>(MINERVA_THREW, [&] {
        const llama_model * model = llama_get_model(context);
        auto head = std::make_unique<minerva_head>();
        head->decoder.context = context;
        head->decoder.abort = decoder->abort;
        head->decoder.connections = decoder->connections;
        head->n_layers = std::max(1, llama_model_n_layer_nextn(model));
        head->width = size_t(llama_model_n_embd_out(model));
        llama_set_embeddings_nextn(decoder->context, true, false);
        llama_set_embeddings_nextn(context, true, true);
        decoder->head = head.release();
        return 0;
    });
}

void minerva_head_copy(minerva_decoder * decoder, int32_t source_id, int32_t target_id) {
    if (!has_head(decoder)) {
        return;
    }
    minerva_head & head = *decoder->head;
    done(head, [&](llama_memory_t memory) {
        head.states[target_id] = States(head.states[source_id]);
        llama_memory_seq_cp(memory, source_id, target_id, -1, -1);
    });
}

struct llama_context * minerva_head_context(const minerva_decoder * decoder) {
    return decoder->head != nullptr ? decoder->head->decoder.context : nullptr;
}

void minerva_head_free(minerva_decoder * decoder) {
    const std::unique_ptr<minerva_head> head(decoder->head);
    decoder->head = nullptr;
    if (head != nullptr) {
        minerva_threads_free(&head->decoder);
        minerva_context_free(head->decoder.context);
    }
}

int32_t minerva_head_draft(minerva_decoder * decoder, int32_t sequence_id, int32_t token, int32_t position, int32_t n,
                           int32_t * drafts) {
    if (decoder->head == nullptr || minerva_has_small_stack()) {
        return 0;
    }
    int32_t count = 0;
    minerva_head & head = *decoder->head;
    llama_context * context = head.decoder.context;
    const int32_t n_vocab = llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(context)));
    const bool is_chain = head.n_layers > 1;
    n = std::min({n, is_chain ? head.n_layers : MINERVA_MOST_DRAFTED, int32_t(llama_n_batch(context))});
    const bool is_done = done(head, [&](llama_memory_t memory) {
        const float * known = head.states[sequence_id].before(position, head.width);
        if (known == nullptr) {
            return;
        }
        std::vector<int32_t> tokens{token};
        std::vector<float> states(known, known + head.width);  // before each of them
        while (count < n) {
            // Each head of a chain has layers of its own, which have to read all that was drafted.
            const int32_t first = is_chain ? 0 : count;
            Batch batch(head);
            for (int32_t index = first; index <= count; ++index) {
                batch.add(tokens[index], position + index, sequence_id, true, states.data() + index * head.width);
            }
            const int32_t layer = is_chain ? count : 0;
            if (batch.decode(memory, layer, layer) != 0) {
                break;
            }
            const float * logits = llama_get_logits_ith(context, -1);
            const float * state = llama_get_embeddings_nextn_ith(context, count - first);
            if (logits == nullptr || state == nullptr) {
                break;
            }
            drafts[count++] = most_likely(logits, n_vocab);
            tokens.push_back(drafts[count - 1]);
            states.insert(states.end(), state, state + head.width);
        }
        llama_memory_seq_rm(memory, sequence_id, position, -1);
    });
    return is_done ? count : MINERVA_THREW;
}
