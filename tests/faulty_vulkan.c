// A Vulkan layer whose device fails when it is told to: while $MINERVA_FAULTS/lost exists no work can be submitted or
// waited for, and while $MINERVA_FAULTS/memory does no memory can be had. The loader finds it by a manifest.
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <vulkan/vk_layer.h>
#include <vulkan/vulkan.h>

// There is one instance and one device in the tests.
static VkInstance instance;
static VkDevice device;
static PFN_vkGetInstanceProcAddr next_of_instance;
static PFN_vkGetDeviceProcAddr next_of_device;

static bool is_told(const char * fault) {
    char path[4096];
    const char * folder = getenv("MINERVA_FAULTS");
    snprintf(path, sizeof path, "%s/%s", folder != NULL ? folder : "", fault);
    return access(path, F_OK) == 0;
}

#define NEXT(name) ((PFN_##name) next_of_device(device, #name))

static VKAPI_ATTR VkResult VKAPI_CALL submit(VkQueue queue, uint32_t count, const VkSubmitInfo * infos, VkFence fence) {
    return is_told("lost") ? VK_ERROR_DEVICE_LOST : NEXT(vkQueueSubmit)(queue, count, infos, fence);
}

static VKAPI_ATTR VkResult VKAPI_CALL wait(VkDevice owner, uint32_t count, const VkFence * fences, VkBool32 all,
                                           uint64_t timeout) {
    return is_told("lost") ? VK_ERROR_DEVICE_LOST : NEXT(vkWaitForFences)(owner, count, fences, all, timeout);
}

static VKAPI_ATTR VkResult VKAPI_CALL status(VkDevice owner, VkFence fence) {
    return is_told("lost") ? VK_ERROR_DEVICE_LOST : NEXT(vkGetFenceStatus)(owner, fence);
}

static VKAPI_ATTR VkResult VKAPI_CALL allocate(VkDevice owner, const VkMemoryAllocateInfo * info,
                                               const VkAllocationCallbacks * callbacks, VkDeviceMemory * memory) {
    return is_told("memory") ? VK_ERROR_OUT_OF_DEVICE_MEMORY
                             : NEXT(vkAllocateMemory)(owner, info, callbacks, memory);
}

// The loader hands each layer the next one, in a list that hangs on the parameters.
#define LINK(kind, structure, infos)                                                                        \
    kind * link = (kind *) (infos)->pNext;                                                                  \
    while (link->sType != structure || link->function != VK_LAYER_LINK_INFO) link = (kind *) link->pNext;

static VKAPI_ATTR VkResult VKAPI_CALL create_instance(const VkInstanceCreateInfo * info,
                                                      const VkAllocationCallbacks * callbacks, VkInstance * made) {
    LINK(VkLayerInstanceCreateInfo, VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO, info)
    next_of_instance = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;
    VkResult result = ((PFN_vkCreateInstance) next_of_instance(NULL, "vkCreateInstance"))(info, callbacks, made);
    instance = *made;
    return result;
}

static VKAPI_ATTR VkResult VKAPI_CALL create_device(VkPhysicalDevice physical, const VkDeviceCreateInfo * info,
                                                    const VkAllocationCallbacks * callbacks, VkDevice * made) {
    LINK(VkLayerDeviceCreateInfo, VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO, info)
    next_of_device = link->u.pLayerInfo->pfnNextGetDeviceProcAddr;
    PFN_vkGetInstanceProcAddr next = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;
    VkResult result = ((PFN_vkCreateDevice) next(instance, "vkCreateDevice"))(physical, info, callbacks, made);
    device = *made;
    return result;
}

VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL vkGetDeviceProcAddr(VkDevice owner, const char * name);
VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL vkGetInstanceProcAddr(VkInstance owner, const char * name);

static PFN_vkVoidFunction ours(const char * name) {
    static const struct {
        const char * name;
        PFN_vkVoidFunction function;
    } all[] = {
        {"vkGetInstanceProcAddr", (PFN_vkVoidFunction) vkGetInstanceProcAddr},
        {"vkGetDeviceProcAddr", (PFN_vkVoidFunction) vkGetDeviceProcAddr},
        {"vkCreateInstance", (PFN_vkVoidFunction) create_instance},
        {"vkCreateDevice", (PFN_vkVoidFunction) create_device},
        {"vkQueueSubmit", (PFN_vkVoidFunction) submit},
        {"vkWaitForFences", (PFN_vkVoidFunction) wait},
        {"vkGetFenceStatus", (PFN_vkVoidFunction) status},
        {"vkAllocateMemory", (PFN_vkVoidFunction) allocate},
    };
    for (size_t index = 0; index < sizeof all / sizeof *all; ++index) {
        if (strcmp(all[index].name, name) == 0) {
            return all[index].function;
        }
    }
    return NULL;
}

PFN_vkVoidFunction vkGetDeviceProcAddr(VkDevice owner, const char * name) {
    PFN_vkVoidFunction function = ours(name);
    return function != NULL ? function : next_of_device(owner, name);
}

PFN_vkVoidFunction vkGetInstanceProcAddr(VkInstance owner, const char * name) {
    PFN_vkVoidFunction function = ours(name);
    return function != NULL ? function : next_of_instance(owner, name);
}
