// The C side of this package: the callbacks for libllama, and decoding steps that take a single call from Python.
//
// The generator parses this header like upstream's, so nothing has to be declared a second time in Python.
#ifndef MINERVA_HOOKS_H
#define MINERVA_HOOKS_H

#include <gguf.h>
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

bool minerva_progress(float progress, void * handle);

// Called when the interpreter shuts down: no thread may enter it any more, to log or to poll; computations stop and no
// guarded call begins. Waits for those that run; if one still does at the deadline, the process will end without the
// destructors of libllama's static data, which that call may use.
void minerva_end(int64_t timeout_us);
bool minerva_is_ending(void);

// ---- Failures -------------------------------------------------------------------------------------------------------
// libllama ends the process when an assertion fails, and throws when memory runs out. The functions below are guarded:
// they return MINERVA_THREW, or NULL if they return a pointer, and `minerva_thrown` has the reason until the next guarded
// call on this thread.

#define MINERVA_THREW (-2147483647)

// Returned before anything is computed on a thread whose stack is too small for that.
#define MINERVA_NO_STACK (-2147483646)
#define MINERVA_STACK_BYTES (128 << 10)

enum minerva_cause {
    MINERVA_NOTHING,
    MINERVA_ASSERTION,
    MINERVA_NO_MEMORY,
    MINERVA_EXCEPTION,
    MINERVA_ENDING,     // the interpreter is shutting down
    MINERVA_FAILED,     // an earlier computation has broken the context
    MINERVA_INHERITED,  // the context belongs to the process that this one was forked from
    MINERVA_LOST,       // an RPC worker cannot be reached, or not any more
    MINERVA_GPU_LOST,   // a GPU of this machine has failed, and the driver gives it up
};

enum minerva_cause minerva_thrown_cause(void);
const char * minerva_thrown(void);

// The connections to RPC workers that a model needs.
typedef struct minerva_connections minerva_connections;

// `connections`: set to those that loading has used, for `minerva_connections_free`, or to NULL.
struct llama_model * minerva_model_load(const char ** paths, size_t n_paths,
                                        const struct llama_model_params * parameters,
                                        minerva_connections ** connections);
struct gguf_context * minerva_gguf_init(const char * path, const struct gguf_init_params * parameters);
struct llama_context * minerva_context_new(struct llama_model * model, const struct llama_context_params * parameters,
                                           const minerva_connections * of_model);
void minerva_connections_free(minerva_connections * connections);

// Free a model or a context, unless a GPU that it is on does not answer any more: libllama would end the process. What was
// thrown before can still be read.
void minerva_model_free(struct llama_model * model);
void minerva_context_free(struct llama_context * context);

// An array of strings of a GGUF file, each as libllama reads it as a token: up to its first NUL, and "[EMPTY_n]" for an
// empty one. Of two equal ones, `first` and `second` are the indices; -1 if there are none. `squares` and `cubes` are sums
// of powers of the lengths.
typedef struct {
    int64_t count;
    int64_t longest;
    int64_t longest_at;
    int64_t first;
    int64_t second;
    double squares;
    double cubes;
} minerva_strings;

int32_t minerva_gguf_strings(const struct gguf_context * file, int64_t key, minerva_strings * strings);

int32_t minerva_tokenize(const struct llama_vocab * vocab, const char * text, int32_t size, int32_t * tokens,
                         int32_t capacity, bool add_special, bool parse_special);
int32_t minerva_token_to_piece(const struct llama_vocab * vocab, int32_t token, char * piece, int32_t capacity,
                               bool special);

// ---- Decoding -------------------------------------------------------------------------------------------------------
// Between two tokens the CPU's caches are cold and each call from Python is slow, so a step is a single call.

typedef struct minerva_head minerva_head;  // see below

typedef struct {
    struct llama_context * context;
    float * logits;  // after the last token of the last batch; the memory is libllama's
    void * threads;  // from `minerva_threads_set`, or NULL
    int failed;      // whether something was thrown in a computation: from then on every call is refused,
    char why[512];   // and this was thrown
    minerva_abort_state * abort;               // what asks a call that waits for an RPC worker to stop, or NULL
    const minerva_connections * connections;  // those of its model, or NULL
    minerva_head * head;                       // what drafts for it, or NULL
} minerva_decoder;

// Give a context worker threads of its own, and take them away, which has to come before `llama_free`. A single token is
// computed by `n_threads`, several by `n_threads_batch`.
int32_t minerva_threads_set(minerva_decoder * decoder, int32_t n_threads, int32_t n_threads_batch);
void minerva_threads_free(minerva_decoder * decoder);

// They may rest while a head computes. This has to come before somebody computes in the decoder's context by other calls.
void minerva_threads_wake(minerva_decoder * decoder);

// All return what `llama_decode` returns.
int32_t minerva_decode(minerva_decoder * decoder, struct llama_batch * batch);
int32_t minerva_decode_one(minerva_decoder * decoder, int32_t token, int32_t position, int32_t sequence_id);

// One token for each of `count` sequences, all with logits: row i of the output belongs to token i.
int32_t minerva_decode_each(minerva_decoder * decoder, int32_t count, const int32_t * tokens, const int32_t * positions,
                            const int32_t * sequence_ids);

// An encoder reads a text as the only one of all `n_seq` sequences (`llama_encode`).
int32_t minerva_encode(minerva_decoder * decoder, int32_t count, const int32_t * tokens, int32_t n_seq);

// ---- MTP heads ------------------------------------------------------------------------------------------------------
// A model's own head guesses the token after the next one from that and the hidden state before it. It computes in a
// context of its own (`LLAMA_CONTEXT_TYPE_MTP`), which does all that the decoder does: evaluate, forget, copy. It shares
// the decoder's number of threads. What fails there ends the guesses, and nothing else.

#define MINERVA_MOST_DRAFTED 32

// Give a decoder a head, whose context it then owns: 0 or MINERVA_THREW. It comes before anything is evaluated, and before
// `minerva_threads_set`.
int32_t minerva_head_new(minerva_decoder * decoder, struct llama_context * context);
void minerva_head_free(minerva_decoder * decoder);
struct llama_context * minerva_head_context(const minerva_decoder * decoder);  // or NULL

// Have the head copy a sequence. `minerva_memory_seq_cp` does; it is for one whose state was read and written instead.
void minerva_head_copy(minerva_decoder * decoder, int32_t source_id, int32_t target_id);

// Write up to `n` tokens that may follow one which is about to be evaluated at this position, and return how many: none if
// the hidden state before it is not known. MINERVA_THREW, once and for all, if something failed in the head's context.
int32_t minerva_head_draft(minerva_decoder * decoder, int32_t sequence_id, int32_t token, int32_t position, int32_t n,
                           int32_t * drafts);

// ---- Memory and states ----------------------------------------------------------------------------------------------

int32_t minerva_memory_clear(minerva_decoder * decoder);
int32_t minerva_memory_seq_rm(minerva_decoder * decoder, int32_t sequence_id, int32_t start, int32_t stop);
int32_t minerva_memory_seq_cp(minerva_decoder * decoder, int32_t source_id, int32_t target_id);
int32_t minerva_memory_seq_add(minerva_decoder * decoder, int32_t sequence_id, int32_t start, int32_t delta);

int64_t minerva_state_size(minerva_decoder * decoder, int32_t sequence_id, uint32_t flags);
int64_t minerva_state_read(minerva_decoder * decoder, int32_t sequence_id, uint32_t flags, uint8_t * state,
                           int64_t capacity);
// `check`: throws if the state holds NaN, an infinity, or a number that becomes one in attention. In a cell of one sequence
// it would spoil all others, because attention multiplies what it has masked by 0, and NaN times 0 is NaN.
int64_t minerva_state_write(minerva_decoder * decoder, int32_t sequence_id, uint32_t flags, const uint8_t * state,
                            int64_t size, bool check);

// ---- Devices --------------------------------------------------------------------------------------------------------

// How much memory a device has: 0 or MINERVA_THREW.
int32_t minerva_device_memory(ggml_backend_dev_t device, size_t * free_bytes, size_t * total_bytes);

// Copy `size` bytes within a device's memory, in rounds: 0 or MINERVA_THREW. `rate`: bytes read and written per second in
// the best round, or 0 if the device has no room for two buffers of that size.
int32_t minerva_copy_rate(ggml_backend_dev_t device, size_t size, double * rate);

// Where a model is: the device of a layer (the one after the last is the output), NULL for the CPU; and the devices that
// it may use, NULL after the last.
ggml_backend_dev_t minerva_layer_device(const struct llama_model * model, int32_t layer);
ggml_backend_dev_t minerva_model_device(const struct llama_model * model, int32_t index);

// What a model, and a context of it or NULL, take of a device's memory, in bytes; NULL is this machine's. If the model
// was loaded with `no_alloc`, it is what they would take.
typedef struct {
    int64_t weights;
    int64_t context;
    int64_t compute;
} minerva_memory_use;

int32_t minerva_memory_used(const struct llama_model * model, const struct llama_context * context,
                            ggml_backend_dev_t device, minerva_memory_use * use);

// Where a device's weights are, for `tensor_buft_overrides`; NULL is this machine.
ggml_backend_buffer_type_t minerva_buffer_type(ggml_backend_dev_t device);

// Whether libllama finds a pattern of `tensor_buft_overrides` in a tensor's name: 1, 0, or MINERVA_THREW for what is
// no regular expression.
int32_t minerva_pattern_matches(const char * pattern, const char * name);

// ---- Backends that are files ----------------------------------------------------------------------------------------
// Built with GGML_BACKEND_DL=ON. Opening a file runs its code.

// How well the backend in a file suits this CPU; 0 if it would not run.
int32_t minerva_backend_score(const char * path);

// Load the backend in a file, for good: its devices are libllama's from then on.
ggml_backend_reg_t minerva_backend_load(const char * path);

// Whether the CPU's backend has a dot product for a type: without one, ggml calls a null pointer.
bool minerva_has_dot(enum ggml_type type);

// ---- RPC ------------------------------------------------------------------------------------------------------------

bool minerva_has_rpc(void);

// Get the devices of the worker at "host:port"; returns how many, or MINERVA_THREW. `timeout_us`: how long it may be
// silent while something is asked of it.
int32_t minerva_rpc_add(const char * endpoint, int64_t timeout_us, ggml_backend_dev_t * devices, int32_t capacity);

// Be a worker on a listening socket, until a signal handler raises an exception.
int32_t minerva_rpc_serve(int fd, const char * endpoint, int32_t n_threads, int32_t n_devices,
                          ggml_backend_dev_t * devices);

// ---- The calling thread ---------------------------------------------------------------------------------------------

// How many bytes of stack the calling thread has left; 0 if the system does not say.
size_t minerva_stack_left(void);

// Whether that is too little to compute with.
bool minerva_has_small_stack(void);

#ifdef __cplusplus
}
#endif

#endif
