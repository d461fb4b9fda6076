#include "hooks.h"

#include <atomic>
#include <vector>

// ---- Callbacks ------------------------------------------------------------------------------------------------------

namespace {

std::atomic<bool> muted{false};

// If nodes are so small that reading the clock matters, only one in `SMALL_NODES` + 1 reads it.
constexpr int SMALL_NODES = 16;
constexpr int64_t SMALL_NODES_US = 1000;

}  // namespace

void minerva_log(enum ggml_log_level level, const char * text, void * /* data */) {
    if (!muted) {
        minerva_on_log(level, text);
    }
}

// libllama calls this at every node of the compute graph, while all its threads wait, so Python is polled at most once
// per `poll_interval_us`.
bool minerva_abort(void * data) {
    auto * state = static_cast<minerva_abort_state *>(data);
    if (state->cancelled || muted) {
        return true;
    }
    if (state->nodes_to_skip > 0) {
        --state->nodes_to_skip;
        return false;
    }
    const int64_t now = llama_time_us();
    if (now - state->clock_read_us < SMALL_NODES_US) {
        state->nodes_to_skip = SMALL_NODES;
    }
    state->clock_read_us = now;
    if (now < state->next_poll_us) {
        return false;
    }
    state->next_poll_us = now + state->poll_interval_us;
    return minerva_on_poll(state->data);
}

void minerva_mute(void) {
    muted = true;
}

// ---- Decoding -------------------------------------------------------------------------------------------------------

int32_t minerva_decode(minerva_decoder * decoder, struct llama_batch * batch) {
    const int32_t code = llama_decode(decoder->context, *batch);
    if (code == 0) {
        decoder->logits = llama_get_logits_ith(decoder->context, -1);  // waits for the result
    }
    return code;
}

int32_t minerva_decode_one(minerva_decoder * decoder, int32_t token, int32_t position, int32_t sequence_id) {
    return minerva_decode_each(decoder, 1, &token, &position, &sequence_id);
}

int32_t minerva_decode_each(minerva_decoder * decoder, int32_t count, const int32_t * tokens, const int32_t * positions,
                            const int32_t * sequence_ids) {
    constexpr int32_t few = 32;  // up to this many tokens, the batch's columns need no heap memory
    int32_t few_sizes[few];
    int32_t * few_ids[few];
    int8_t few_outputs[few];
    std::vector<int32_t> sizes(count > few ? count : 0);
    std::vector<int32_t *> ids(count > few ? count : 0);
    std::vector<int8_t> outputs(count > few ? count : 0);

    // libllama only reads a batch, though its fields are not const.
    llama_batch batch = {};
    batch.n_tokens = count;
    batch.token = const_cast<int32_t *>(tokens);
    batch.pos = const_cast<int32_t *>(positions);
    batch.n_seq_id = count > few ? sizes.data() : few_sizes;
    batch.seq_id = count > few ? ids.data() : few_ids;
    batch.logits = count > few ? outputs.data() : few_outputs;
    for (int32_t index = 0; index < count; ++index) {
        batch.n_seq_id[index] = 1;
        batch.seq_id[index] = const_cast<int32_t *>(sequence_ids + index);
        batch.logits[index] = 1;
    }
    return minerva_decode(decoder, &batch);
}
