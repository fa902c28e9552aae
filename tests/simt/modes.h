// The schedules and landings that every kernel is run in.
#pragma once
#include <vector>

#include "fiber.h"
#include "simt.h"

namespace simt {

struct NamedMode {
  const char* name;
  Mode mode;
};

inline std::vector<NamedMode> modes() {
  if (tsan::active()) {
    return {{"round robin, late landing", {Schedule::kRoundRobin, Landing::kLate, 0}},
            {"warp run-ahead, early landing", {Schedule::kWarpRunAhead, Landing::kEarly, 0}},
            {"random 1", {Schedule::kRandom, Landing::kRandom, 1}}};
  }
  return {{"round robin, late landing", {Schedule::kRoundRobin, Landing::kLate, 0}},
          {"warp run-ahead, early landing", {Schedule::kWarpRunAhead, Landing::kEarly, 0}},
          {"random 1", {Schedule::kRandom, Landing::kRandom, 1}},
          {"random 2", {Schedule::kRandom, Landing::kRandom, 2}},
          {"random 3", {Schedule::kRandom, Landing::kRandom, 3}}};
}

}  // namespace simt
