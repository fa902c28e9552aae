# What the CUDA backend is made of. Included by the root and so visible to tests/simt, which compiles
# the same files as plain C++.

# Launchers, run_<op>_cuda(), and the kernels that need no instances.
set(LONGCTX_CUDA_SOURCES
  csrc/cuda/antidiagonal_scores.cu
  csrc/cuda/append_kv.cu
  csrc/cuda/attention_mass.cu
  csrc/cuda/block_scores.cu
  csrc/cuda/compact_kv.cu
  csrc/cuda/attention.cu
  csrc/cuda/gather_attention.cu
  csrc/cuda/gather_kv.cu
  csrc/cuda/instances.cpp
  csrc/cuda/key_scores.cu
  csrc/cuda/kmeans.cu
  csrc/cuda/linear_attention.cu
  csrc/cuda/linear_attention_decode.cu
  csrc/cuda/merge_states.cu
  csrc/cuda/schedule.cu
  csrc/cuda/select_blocks.cu
  csrc/cuda/sm90/attention_path.cu
  csrc/cuda/sm90/tensor_map.cu
  csrc/cuda/summarize_pages.cu
  csrc/cuda/topk_select.cu
  csrc/cuda/unowned_rows.cu)
list(TRANSFORM LONGCTX_CUDA_SOURCES PREPEND ${CMAKE_SOURCE_DIR}/)

# longctx_cuda_kernel(<kernel> <family> "<arguments>" DTYPES <dtype>... HEAD_DIMS <n>...)
#
# Declares a kernel that is compiled once per dtype and head_dim, each in a file of its own.
#   sm_80: runs everywhere; csrc/cuda/<kernel>.h, <kernel>.cuh, namespace longctx::cuda
#   sm_90a: Hopper only; csrc/cuda/sm90/<kernel>.h, <kernel>.cuh, namespace longctx::cuda::sm90
# The .h, free of device code, declares what the .cuh defines:
#   template <class T, int head_dim> void launch_<kernel>(<arguments>);
#   template <class T, int head_dim> int64_t <kernel>_shared_bytes();  // the most that a launch asks
function(longctx_cuda_kernel kernel family arguments)
  cmake_parse_arguments(PARSE_ARGV 3 arg "" "" "DTYPES;HEAD_DIMS")
  foreach(dtype IN LISTS arg_DTYPES)
    foreach(head_dim IN LISTS arg_HEAD_DIMS)
      set_property(GLOBAL APPEND PROPERTY longctx_cuda_instances
        "${kernel}|${family}|${arguments}|${dtype}|${head_dim}")
    endforeach()
  endforeach()
endfunction()

set(attention_arguments
  "const longctx::AttentionParams&, const longctx::BlockList*, const longctx::cuda::AttentionPlan&")
longctx_cuda_kernel(attention sm_80 "${attention_arguments}"
  DTYPES bfloat16 float16 HEAD_DIMS 64 96 128 192 256)
longctx_cuda_kernel(attention sm_90a "${attention_arguments}"
  DTYPES bfloat16 float16 HEAD_DIMS 64 128 256)
longctx_cuda_kernel(attention_fp32 sm_80 "${attention_arguments}" DTYPES float32 HEAD_DIMS 64 128 256)

longctx_cuda_kernel(gather_attention sm_80
  "const longctx::GatherAttentionParams&, const longctx::cuda::GatherPlan&"
  DTYPES bfloat16 float16 float32 HEAD_DIMS 64 128 256)

set(linear_arguments "const longctx::LinearAttentionParams&, const longctx::cuda::LinearPass&")
longctx_cuda_kernel(linear_attention sm_80 "${linear_arguments}"
  DTYPES bfloat16 float16 HEAD_DIMS 64 128 256)
longctx_cuda_kernel(linear_attention_fp32 sm_80 "${linear_arguments}" DTYPES float32 HEAD_DIMS 64 128 256)

# The two head_dims that most models have, each 16-bit dtype at one of them; and what runs another code path.
set(LONGCTX_REPRESENTATIVE_INSTANCES bfloat16-128 float16-64 float32-64 float32-128 linear_attention-bfloat16-256)

# longctx_cuda_instances(<prefix> <representative|all> <family>...)
#
# Writes the declared instances of these families into the build folder: <prefix>_SM80 and
# <prefix>_SM90 are the lists of their .cu files, <prefix>_TABLE is the C++ file with the table of
# them (csrc/cuda/instances.h). What is declared but not compiled raises when it is called.
function(longctx_cuda_instances prefix selection)
  set(folder ${CMAKE_BINARY_DIR}/cuda_instances/${prefix})
  set(type_bfloat16 __nv_bfloat16)
  set(type_float16 __half)
  set(type_float32 float)
  set(namespace_sm_80 longctx::cuda)
  set(namespace_sm_90a longctx::cuda::sm90)
  set(path_sm_80 cuda)
  set(path_sm_90a cuda/sm90)
  set(files_sm_80)
  set(files_sm_90a)
  set(includes)
  set(rows "")
  set(missing "")
  get_property(instances GLOBAL PROPERTY longctx_cuda_instances)
  foreach(instance IN LISTS instances)
    string(REPLACE "|" ";" fields "${instance}")
    list(GET fields 0 kernel)
    list(GET fields 1 family)
    list(GET fields 2 arguments)
    list(GET fields 3 dtype)
    list(GET fields 4 head_dim)
    set(namespace ${namespace_${family}})
    set(path ${path_${family}})
    set(type ${type_${dtype}})
    list(APPEND includes "#include \"${path}/${kernel}.h\"\n")
    if(family IN_LIST ARGN AND (selection STREQUAL "all"
        OR "${dtype}-${head_dim}" IN_LIST LONGCTX_REPRESENTATIVE_INSTANCES
        OR "${kernel}-${dtype}-${head_dim}" IN_LIST LONGCTX_REPRESENTATIVE_INSTANCES))
      set(file ${folder}/${kernel}_${family}_${dtype}_${head_dim}.cu)
      configure_file(${CMAKE_SOURCE_DIR}/csrc/cuda/instance.cu.in ${file} @ONLY)
      list(APPEND files_${family} ${file})
      string(APPEND rows "      {\"${kernel}\", \"${family}\", \"${dtype}\", ${head_dim}, "
        "${namespace}::${kernel}_shared_bytes<${type}, ${head_dim}>()},\n")
    else()
      string(APPEND missing "template <>\nvoid ${namespace}::launch_${kernel}<${type}, ${head_dim}>"
        "(${arguments}) {\n  missing_instance(\"${kernel}\", \"${family}\", \"${dtype}\", ${head_dim});\n}\n")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES includes)
  list(JOIN includes "" includes)
  configure_file(${CMAKE_SOURCE_DIR}/csrc/cuda/instance_table.cpp.in ${folder}/instance_table.cpp @ONLY)
  set(${prefix}_SM80 ${files_sm_80} PARENT_SCOPE)
  set(${prefix}_SM90 ${files_sm_90a} PARENT_SCOPE)
  set(${prefix}_TABLE ${folder}/instance_table.cpp PARENT_SCOPE)
endfunction()
