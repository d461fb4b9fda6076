// The C side of this package: the callbacks for libllama, and decoding steps that take a single call from Python.
//
// The generator parses this header like upstream's, so nothing has to be declared a second time in Python.
#ifndef MINERVA_HOOKS_H
#define MINERVA_HOOKS_H

#include <llama.h>

// Marks functions that Python defines (see callbacks.py) and C calls.
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

// When to check whether a computation should stop: the `abort_callback_data` of a context whose `abort_callback` is
// `minerva_abort`.
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

// Called when the interpreter shuts down: no library thread may enter it any more, to log or to poll, and computations
// stop.
void minerva_mute(void);

// ---- Decoding -------------------------------------------------------------------------------------------------------
// Between two tokens the CPU's caches are cold and each call from Python is slow, so a step is a single call.

typedef struct {
    struct llama_context * context;
    float * logits;  // after the last token of the last batch; the memory is libllama's
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
