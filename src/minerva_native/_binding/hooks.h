// The C side of this package: what libllama calls back into, and the steps of the engine that are one call from Python.
//
// The generator reads this header as it reads upstream's, so each declaration stands here and nowhere else.
#ifndef MINERVA_HOOKS_H
#define MINERVA_HOOKS_H

#include <llama.h>

// Marks what Python defines (see callbacks.py) and C calls.
#ifndef MINERVA_PYTHON
#define MINERVA_PYTHON
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ---- Callbacks ------------------------------------------------------------------------------------------------------

MINERVA_PYTHON void minerva_on_log(int level, const char * text);
MINERVA_PYTHON bool minerva_on_progress(float progress, void * handle);
MINERVA_PYTHON bool minerva_on_poll(void * data);

// When a computation looks up: the `abort_callback_data` of a context whose `abort_callback` is `minerva_abort`.
typedef struct {
    volatile int cancelled;
    int64_t poll_interval_us;
    int64_t next_poll_us;
    int64_t clock_read_us;
    int nodes_to_skip;
    void * data;  // for minerva_on_poll: a cffi handle, or NULL
} minerva_abort_state;

void minerva_log(enum ggml_log_level level, const char * text, void * data);
bool minerva_abort(void * state);

// The interpreter is going away: no library thread may enter it, to log or to ask, and computations stop.
void minerva_mute(void);

// ---- Decoding -------------------------------------------------------------------------------------------------------
// Between two tokens nothing is warm and each call from Python costs, so a step is one call.

typedef struct {
    struct llama_context * context;
    float * logits;  // after the last token of the last batch: libllama's memory
} minerva_decoder;

// All return what `llama_decode` returns.
int32_t minerva_decode(minerva_decoder * decoder, struct llama_batch * batch);
int32_t minerva_decode_one(minerva_decoder * decoder, int32_t token, int32_t position, int32_t sequence_id);

// One token for each of `count` sequences, all with logits: row i of the output belongs to token i.
int32_t minerva_decode_each(minerva_decoder * decoder, int32_t count, const int32_t * tokens, const int32_t * positions,
                            const int32_t * sequence_ids);

#ifdef __cplusplus
}
#endif

#endif
