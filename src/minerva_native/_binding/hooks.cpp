#include "failure.h"
#include "head.h"

#include <llama-ext.h>
#include <llama-model.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <regex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

using minerva::guarded;

// ---- Callbacks ------------------------------------------------------------------------------------------------------

namespace {

// If nodes are so small that reading the clock matters, only one in `SMALL_NODES` + 1 reads it.
constexpr int SMALL_NODES = 16;
constexpr int64_t SMALL_NODES_US = 1000;

}  // namespace

void minerva_log(enum ggml_log_level level, const char * text, void * /* data */) {
    if (!minerva_is_ending()) {
        minerva_on_log(level, text);
    }
}

// libllama calls this at every node of the compute graph, while all its threads wait, so Python is polled at most once
// per `poll_interval_us`.
bool minerva_abort(void * data) {
    auto * state = static_cast<minerva_abort_state *>(data);
    if (state->cancelled || minerva_is_ending()) {
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

bool minerva_progress(float progress, void * handle) {
    return !minerva_is_ending() && minerva_on_progress(progress, handle);
}

// ---- The calling thread ---------------------------------------------------------------------------------------------

namespace {

// The lowest address of the calling thread's stack, which grows down; 0 if the system does not say.
uintptr_t stack_end() {
#if defined(__APPLE__)
    return reinterpret_cast<uintptr_t>(pthread_get_stackaddr_np(pthread_self())) -
           pthread_get_stacksize_np(pthread_self());
#else
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) {
        return 0;
    }
    void * lowest = nullptr;
    size_t size = 0;
    pthread_attr_getstack(&attributes, &lowest, &size);
    pthread_attr_destroy(&attributes);
    return reinterpret_cast<uintptr_t>(lowest);
#endif
}

}  // namespace

size_t minerva_stack_left(void) {
    thread_local const uintptr_t end = stack_end();  // glibc reads a file to find the main thread's
    const auto here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    return end != 0 && here > end ? here - end : 0;
}

bool minerva_has_small_stack(void) {
    const size_t left = minerva_stack_left();
    return left > 0 && left < MINERVA_STACK_BYTES;
}

static bool is_remote(ggml_backend_dev_t device) {
    return std::strcmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "RPC") == 0;
}

// ---- Models, contexts and texts -------------------------------------------------------------------------------------

struct llama_model * minerva_model_load(const char ** paths, size_t n_paths,
                                        const struct llama_model_params * parameters,
                                        minerva_connections ** connections) {
    *connections = nullptr;
    return guarded<llama_model *>(nullptr, [&] {
        const minerva::rpc::Taking taking;
        llama_model * model = n_paths == 1 ? llama_model_load_from_file(paths[0], *parameters)
                                           : llama_model_load_from_splits(paths, n_paths, *parameters);
        *connections = taking.taken();
        return model;
    });
}

struct gguf_context * minerva_gguf_init(const char * path, const struct gguf_init_params * parameters) {
    return guarded<gguf_context *>(nullptr, [&] { return gguf_init_from_file(path, *parameters); });
}

struct llama_context * minerva_context_new(struct llama_model * model, const struct llama_context_params * parameters,
                                           const minerva_connections * of_model) {
    return guarded<llama_context *>(nullptr, [&] {
        if (minerva_has_small_stack()) {
            throw std::runtime_error("this thread's stack is too small: give it a megabyte (threading.stack_size)");
        }
        const bool is_dry = model->hparams.no_alloc;  // there are no weights that a worker could have lost
        const minerva::rpc::Taking taking(is_dry ? nullptr : of_model);
        llama_context * context = llama_init_from_model(model, *parameters);
        if (context != nullptr) {
            std::unique_ptr<llama_context, void (*)(llama_context *)> owned(context, minerva_context_free);
            if (!is_dry) {
                taking.check();
            }
            owned.release();
        }
        return context;
    });
}

void minerva_context_free(struct llama_context * context) {
    if (minerva::can_be_done([&] { llama_synchronize(context); })) {
        llama_free(context);
    }
}

void minerva_model_free(struct llama_model * model) {
    const bool do_all_answer = minerva::can_be_done([&] {
        for (int32_t index = 0; index < llama_model_n_devices(model); ++index) {
            ggml_backend_dev_t device = llama_model_get_device(model, index);
            if (!is_remote(device)) {
                size_t free_bytes = 0, total_bytes = 0;
                ggml_backend_dev_memory(device, &free_bytes, &total_bytes);  // CUDA fails here if it fails anywhere
            }
        }
    });
    if (do_all_answer) {
        llama_model_free(model);
    }
}

int32_t minerva_gguf_strings(const struct gguf_context * file, int64_t key, minerva_strings * strings) {
    return guarded<int32_t>(MINERVA_THREW, [&] {
        const auto count = int64_t(gguf_get_arr_n(file, key));
        *strings = {count, 0, 0, -1, -1, 0, 0};
        std::unordered_map<std::string_view, int64_t> seen(count);
        std::deque<std::string> names;
        for (int64_t index = 0; index < count; ++index) {
            std::string_view string = gguf_get_arr_str(file, key, index);
            if (string.empty()) {
                string = names.emplace_back("[EMPTY_" + std::to_string(index) + "]");
            }
            const auto size = double(string.size());
            strings->squares += size * size;
            strings->cubes += size * size * size;
            if (int64_t(string.size()) > strings->longest) {
                strings->longest = int64_t(string.size());
                strings->longest_at = index;
            }
            const auto [other, is_new] = seen.emplace(string, index);
            if (!is_new && strings->second < 0) {
                strings->first = other->second;
                strings->second = index;
            }
        }
        return 0;
    });
}

int32_t minerva_tokenize(const struct llama_vocab * vocab, const char * text, int32_t size, int32_t * tokens,
                         int32_t capacity, bool add_special, bool parse_special) {
    return guarded<int32_t>(MINERVA_THREW, [&] {
        return llama_tokenize(vocab, text, size, tokens, capacity, add_special, parse_special);
    });
}

int32_t minerva_token_to_piece(const struct llama_vocab * vocab, int32_t token, char * piece, int32_t capacity,
                               bool special) {
    return guarded<int32_t>(
        MINERVA_THREW, [&] { return llama_token_to_piece(vocab, token, piece, capacity, 0, special); });
}

// ---- Decoding -------------------------------------------------------------------------------------------------------

int32_t minerva_decode(minerva_decoder * decoder, struct llama_batch * batch) {
    if (minerva_has_small_stack()) {
        return MINERVA_NO_STACK;
    }
    return guarded<int32_t>(MINERVA_THREW, decoder, true, [&] {
        minerva::wake(decoder);
        const int32_t code = llama_decode(decoder->context, *batch);
        if (code == 0) {
            decoder->logits = llama_get_logits_ith(decoder->context, -1);  // waits for the result
            minerva::follow(decoder, *batch);
        }
        return code;
    });
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

int32_t minerva_encode(minerva_decoder * decoder, int32_t count, const int32_t * tokens, int32_t n_seq) {
    if (minerva_has_small_stack()) {
        return MINERVA_NO_STACK;
    }
    return guarded<int32_t>(MINERVA_THREW, decoder, true, [&] {
        std::vector<int32_t> positions(count), sizes(count, n_seq), ids(n_seq);
        std::vector<int32_t *> of_each(count, ids.data());
        std::iota(positions.begin(), positions.end(), 0);
        std::iota(ids.begin(), ids.end(), 0);
        llama_batch batch = {};
        batch.n_tokens = count;
        batch.token = const_cast<int32_t *>(tokens);
        batch.pos = positions.data();
        batch.n_seq_id = sizes.data();
        batch.seq_id = of_each.data();
        minerva::wake(decoder);
        const int32_t code = llama_encode(decoder->context, batch);
        llama_synchronize(decoder->context);
        return code;
    });
}

// ---- Memory and states ----------------------------------------------------------------------------------------------

int32_t minerva_memory_clear(minerva_decoder * decoder) {
    return guarded<int32_t>(MINERVA_THREW, decoder, true, [&] {
        minerva::head_clear(decoder);
        llama_memory_clear(llama_get_memory(decoder->context), true);
        return 0;
    });
}

int32_t minerva_memory_seq_rm(minerva_decoder * decoder, int32_t sequence_id, int32_t start, int32_t stop) {
    return guarded<int32_t>(MINERVA_THREW, decoder, true, [&] {
        minerva::head_forget(decoder, sequence_id, start, stop);
        return llama_memory_seq_rm(llama_get_memory(decoder->context), sequence_id, start, stop) ? 1 : 0;
    });
}

int32_t minerva_memory_seq_cp(minerva_decoder * decoder, int32_t source_id, int32_t target_id) {
    return guarded<int32_t>(MINERVA_THREW, decoder, true, [&] {
        llama_memory_seq_cp(llama_get_memory(decoder->context), source_id, target_id, -1, -1);
        minerva_head_copy(decoder, source_id, target_id);
        return 0;
    });
}

int32_t minerva_memory_seq_add(minerva_decoder * decoder, int32_t sequence_id, int32_t start, int32_t delta) {
    return guarded<int32_t>(MINERVA_THREW, decoder, true, [&] {
        llama_memory_seq_add(llama_get_memory(decoder->context), sequence_id, start, -1, delta);
        return 0;
    });
}

namespace {

thread_local bool is_checking = false;
thread_local bool all_finite = true;
thread_local std::exception_ptr not_copied;  // why a device has not given or taken a tensor

struct Checking {
    explicit Checking(bool is_wanted) {
        is_checking = is_wanted;
        all_finite = true;
    }
    ~Checking() { is_checking = false; }
};

// Runs in destructors, so nothing can be thrown.
template <class Copy> void copy_guarded(Copy copy) {
    try {
        copy();
    } catch (abi::__forced_unwind &) {
        throw;
    } catch (...) {
        not_copied = std::current_exception();
    }
}

void check_copied() {
    if (not_copied) {
        std::rethrow_exception(std::exchange(not_copied, nullptr));
    }
}

// Whether the bits of every number, without the sign, are below those of a limit.
template <class Word> bool are_below(const uint8_t * data, size_t size, Word limit) {
    constexpr Word magnitude = Word(~Word(0)) >> 1;
    Word largest = 0;
    for (size_t at = 0; at + sizeof(Word) <= size; at += sizeof(Word)) {
        Word word;
        std::memcpy(&word, data + at, sizeof word);
        largest = std::max(largest, Word(word & magnitude));
    }
    return largest < limit;
}

bool is_finite(const struct ggml_tensor & tensor, const uint8_t * data, size_t size) {
    constexpr uint32_t too_large_for_f16 = 0x477FF000;  // flash attention converts keys and values
    constexpr uint32_t too_large_to_square = 0x5F800000;
    const bool is_cache = std::strncmp(tensor.name, "cache_k", 7) == 0 || std::strncmp(tensor.name, "cache_v", 7) == 0;
    switch (tensor.type) {
        case GGML_TYPE_F32:
            return are_below<uint32_t>(data, size, is_cache ? too_large_for_f16 : too_large_to_square);
        case GGML_TYPE_F16:
            return are_below<uint16_t>(data, size, 0x7C00);
        case GGML_TYPE_BF16:
            return are_below<uint16_t>(data, size, too_large_to_square >> 16);
        default:
            break;
    }
    const auto to_float = ggml_get_type_traits(tensor.type)->to_float;
    if (to_float == nullptr) {  // integers
        return true;
    }
    constexpr size_t n_blocks = 64;
    const size_t block_size = ggml_blck_size(tensor.type), block_bytes = ggml_type_size(tensor.type);
    std::vector<float> numbers(n_blocks * block_size);
    for (size_t at = 0; at < size; at += n_blocks * block_bytes) {
        const size_t count = std::min(n_blocks, (size - at) / block_bytes) * block_size;
        to_float(data + at, numbers.data(), int64_t(count));
        if (!are_below(reinterpret_cast<const uint8_t *>(numbers.data()), count * sizeof(float), too_large_to_square)) {
            return false;
        }
    }
    return true;
}

}  // namespace

// A state that cannot be read or written does not break the context: the caller clears what was written.

int64_t minerva_state_size(minerva_decoder * decoder, int32_t sequence_id, uint32_t flags) {
    return guarded<int64_t>(MINERVA_THREW, decoder, false, [&] {
        return int64_t(llama_state_seq_get_size_ext(decoder->context, sequence_id, flags));
    });
}

int64_t minerva_state_read(minerva_decoder * decoder, int32_t sequence_id, uint32_t flags, uint8_t * state,
                           int64_t capacity) {
    return guarded<int64_t>(MINERVA_THREW, decoder, false, [&] {
        const size_t used = llama_state_seq_get_data_ext(decoder->context, state, capacity, sequence_id, flags);
        check_copied();
        return int64_t(used);
    });
}

int64_t minerva_state_write(minerva_decoder * decoder, int32_t sequence_id, uint32_t flags, const uint8_t * state,
                            int64_t size, bool check) {
    return guarded<int64_t>(MINERVA_THREW, decoder, false, [&] {
        const Checking checking(check);
        if ((flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) == 0) {
            minerva::head_forget(decoder, sequence_id, -1, -1);
        }
        const auto used = int64_t(llama_state_seq_set_data_ext(decoder->context, state, size, sequence_id, flags));
        check_copied();
        if (!all_finite) {
            throw std::runtime_error("it holds numbers that are not finite, which would spoil the other sequences");
        }
        return used;
    });
}

// Where libllama reads and writes states, the build has it call these instead of `ggml_backend_tensor_set` and `_get`. What
// is not finite is left out.
extern "C" void minerva_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    if (is_checking && !is_finite(*tensor, static_cast<const uint8_t *>(data), size)) {
        all_finite = false;
        return;
    }
    copy_guarded([&] { ggml_backend_tensor_set(tensor, data, offset, size); });
}

extern "C" void minerva_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    copy_guarded([&] { ggml_backend_tensor_get(tensor, data, offset, size); });
}

// ---- Devices --------------------------------------------------------------------------------------------------------

int32_t minerva_device_memory(ggml_backend_dev_t device, size_t * free_bytes, size_t * total_bytes) {
    return guarded<int32_t>(MINERVA_THREW, [&] {
        ggml_backend_dev_memory(device, free_bytes, total_bytes);
        return 0;
    });
}

// If something is thrown, what there is stays in memory: a device that fails cannot free it either.
int32_t minerva_copy_rate(ggml_backend_dev_t device, size_t size, double * rate) {
    constexpr int n_rounds = 6, n_times = 16;  // the first round is a warm-up
    return guarded<int32_t>(MINERVA_THREW, [&] {
        *rate = 0.0;
        ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
        if (backend == nullptr) {
            throw std::runtime_error("the device cannot be used");
        }
        ggml_context * context = ggml_init({2 * ggml_tensor_overhead(), nullptr, true});
        ggml_tensor * source = ggml_new_tensor_1d(context, GGML_TYPE_I8, int64_t(size));
        ggml_tensor * target = ggml_new_tensor_1d(context, GGML_TYPE_I8, int64_t(size));
        if (ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(context, backend)) {
            ggml_backend_tensor_memset(source, 1, 0, size);
            for (int round = 0; round < n_rounds; ++round) {
                const int64_t start = llama_time_us();
                for (int time = 0; time < n_times; ++time) {
                    ggml_backend_tensor_copy_async(backend, backend, source, target);
                }
                ggml_backend_synchronize(backend);
                const double seconds = double(std::max<int64_t>(1, llama_time_us() - start)) / 1e6;
                *rate = std::max(*rate, round > 0 ? 2.0 * double(size) * n_times / seconds : 0.0);
            }
            ggml_backend_buffer_free(buffer);
        }
        ggml_free(context);
        ggml_backend_free(backend);
        return 0;
    });
}

ggml_backend_dev_t minerva_layer_device(const struct llama_model * model, int32_t layer) {
    return guarded<ggml_backend_dev_t>(nullptr, [&] {
        const bool is_output = layer >= int32_t(model->hparams.n_layer());
        ggml_backend_dev_t device = is_output ? model->dev_output() : model->dev_layer(layer);
        return device == nullptr || ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_CPU ? nullptr : device;
    });
}

// The device whose memory a buffer is in, a null pointer for this machine's: some of that is for a GPU to read.
static ggml_backend_dev_t owner_of(ggml_backend_buffer_type_t type) {
    ggml_backend_dev_t owner = ggml_backend_buft_get_device(type);
    const bool is_here = owner == nullptr || ggml_backend_buft_is_host(type) ||
                         ggml_backend_dev_type(owner) == GGML_BACKEND_DEVICE_TYPE_CPU;
    return is_here ? nullptr : owner;
}

ggml_backend_dev_t minerva_model_device(const struct llama_model * model, int32_t index) {
    return guarded<ggml_backend_dev_t>(nullptr, [&] {
        return index < llama_model_n_devices(model) ? llama_model_get_device(model, index) : nullptr;
    });
}

int32_t minerva_memory_used(const struct llama_model * model, const struct llama_context * context,
                            ggml_backend_dev_t device, minerva_memory_use * use) {
    return guarded<int32_t>(MINERVA_THREW, [&] {
        llama_memory_breakdown all;
        if (context != nullptr) {
            all = llama_get_memory_breakdown(context);
        } else {
            for (const auto & [type, size] : model->memory_breakdown()) {
                all[type].model = size;
            }
        }
        *use = {};
        for (const auto & [type, part] : all) {
            if (owner_of(type) == device) {
                use->weights += int64_t(part.model);
                use->context += int64_t(part.context);
                use->compute += int64_t(part.compute);
            }
        }
        if (device == nullptr) {  // a mapped file has what is elsewhere, too
            use->weights = 0;
            for (const auto & [name, tensor] : model->tensors_by_name) {
                const bool is_here = tensor->buffer != nullptr &&
                                     owner_of(ggml_backend_buffer_get_type(tensor->buffer)) == nullptr;
                use->weights += is_here ? int64_t(ggml_nbytes(tensor)) : 0;
            }
        }
        return 0;
    });
}

ggml_backend_buffer_type_t minerva_buffer_type(ggml_backend_dev_t device) {
    return guarded<ggml_backend_buffer_type_t>(nullptr, [&] {
        return device == nullptr ? ggml_backend_cpu_buffer_type() : ggml_backend_dev_buffer_type(device);
    });
}

int32_t minerva_pattern_matches(const char * pattern, const char * name) {
    return guarded<int32_t>(MINERVA_THREW, [&] { return std::regex_search(name, std::regex(pattern)) ? 1 : 0; });
}
