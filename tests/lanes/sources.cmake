set(LONGCTX_LANES_SOURCES main.cu matrix_cases.cu thread_cases.cu)
list(TRANSFORM LONGCTX_LANES_SOURCES PREPEND ${CMAKE_SOURCE_DIR}/tests/lanes/)
set(LONGCTX_LANES_SM90_SOURCES
  ${CMAKE_SOURCE_DIR}/csrc/cuda/sm90/tensor_map.cu
  ${CMAKE_SOURCE_DIR}/tests/lanes/hopper_cases.cu)
