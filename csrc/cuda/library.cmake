# liblongctx_cuda.so. Included by the root when LONGCTX_CUDA is on.

# One binary per major version for Ampere and Hopper, and PTX for whatever comes after.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 80-virtual)
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

set(LONGCTX_CUDA_INSTANCES all CACHE STRING
  "Which (dtype, head_dim) every kernel is compiled for: all, or representative (two of them)")
set_property(CACHE LONGCTX_CUDA_INSTANCES PROPERTY STRINGS all representative)
if(NOT LONGCTX_CUDA_INSTANCES MATCHES "^(all|representative)$")
  message(FATAL_ERROR "LONGCTX_CUDA_INSTANCES must be all or representative; got ${LONGCTX_CUDA_INSTANCES}")
endif()

# ---- Hopper: WGMMA and TMA through the headers of CUTLASS ---------------------------------------
set(LONGCTX_CUTLASS_DIR "" CACHE PATH "CUTLASS's include folder; found in the Python environment if empty")
set(cutlass_dir ${LONGCTX_CUTLASS_DIR})
if(NOT cutlass_dir)
  execute_process(
    COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/build_tools/find_cutlass.py
    OUTPUT_VARIABLE cutlass_dir OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
set(default_sm90 OFF)
if("${CMAKE_CUDA_ARCHITECTURES}" MATCHES "90|native|all")
  set(default_sm90 ON)
endif()
option(LONGCTX_SM90 "Build the kernels that only Hopper runs (sm_90a; needs CUTLASS)" ${default_sm90})
set(cutlass_version "")
set(families sm_80)
if(LONGCTX_SM90 AND EXISTS "${cutlass_dir}/cutlass/version.h")
  list(APPEND families sm_90a)
  file(STRINGS ${cutlass_dir}/cutlass/version.h lines REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9;]" "" cutlass_version "${lines}")
  list(JOIN cutlass_version "." cutlass_version)
  message(STATUS "longctx: CUTLASS ${cutlass_version} in ${cutlass_dir}")
elseif(LONGCTX_SM90)
  message(WARNING "longctx: no CUTLASS headers (pip install --no-deps nvidia-cutlass==4.2.0.0, or "
    "-DLONGCTX_CUTLASS_DIR=<include folder>): the Hopper kernels are left out, and Hopper runs the sm_80 ones")
endif()

# ---- objects: one library per set of flags -------------------------------------------------------
longctx_cuda_instances(cuda ${LONGCTX_CUDA_INSTANCES} ${families})

add_library(longctx_cuda_flags INTERFACE)
target_include_directories(longctx_cuda_flags INTERFACE
  ${CMAKE_SOURCE_DIR}/include ${CMAKE_SOURCE_DIR}/csrc)
set(cuda_options --expt-relaxed-constexpr -Xptxas=-v
  -Xcompiler=-Wall,-Wextra -ffile-prefix-map=${CMAKE_SOURCE_DIR}/=)
if(LONGCTX_WERROR)
  list(APPEND cuda_options -Werror=all-warnings)
endif()
target_compile_options(longctx_cuda_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_options}>")
# `ptxas -v` says what each kernel spills; the launcher keeps it beside the object.
set(CMAKE_CUDA_COMPILER_LAUNCHER
  sh ${CMAKE_SOURCE_DIR}/build_tools/compile_cuda.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})

add_library(longctx_cuda_sm80 OBJECT ${LONGCTX_CUDA_SOURCES} ${cuda_TABLE} ${cuda_SM80})
target_link_libraries(longctx_cuda_sm80 PRIVATE longctx_cuda_flags CUDA::toolkit)
if(cuda_SM90)
  target_compile_definitions(longctx_cuda_sm80 PRIVATE LONGCTX_SM90)
endif()
set(objects $<TARGET_OBJECTS:longctx_cuda_sm80>)

if(cuda_SM90)
  add_library(longctx_cuda_sm90 OBJECT ${cuda_SM90})
  target_link_libraries(longctx_cuda_sm90 PRIVATE longctx_cuda_flags)
  target_include_directories(longctx_cuda_sm90 SYSTEM PRIVATE ${cutlass_dir})
  set_target_properties(longctx_cuda_sm90 PROPERTIES CUDA_ARCHITECTURES 90a-real)
  list(APPEND objects $<TARGET_OBJECTS:longctx_cuda_sm90>)
endif()

# ---- the library ---------------------------------------------------------------------------------
add_library(longctx_cuda MODULE csrc/cuda/register.cpp ${objects})
target_include_directories(longctx_cuda PRIVATE include csrc)
target_compile_definitions(longctx_cuda PRIVATE USE_CUDA
  LONGCTX_NVCC_VERSION="${CMAKE_CUDA_COMPILER_VERSION}"
  LONGCTX_CUDA_ARCHITECTURES="$<JOIN:${CMAKE_CUDA_ARCHITECTURES}, >"
  LONGCTX_CUTLASS_VERSION="${cutlass_version}")
target_link_libraries(longctx_cuda PRIVATE torch_stable CUDA::cudart_static)
install(TARGETS longctx_cuda LIBRARY DESTINATION longctx)

# What build_tools/check_cuda.py reads.
file(GENERATE OUTPUT ${CMAKE_BINARY_DIR}/cuda_objects.txt CONTENT "$<JOIN:${objects},\n>\n")
