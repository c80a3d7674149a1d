// What each kind of step is made from.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "cpu/int8_program/plan.h"

namespace qkernels {

// Null for a line that only declares something.
using StepMaker = std::unique_ptr<Step> (*)(Line& line);
const std::map<std::string, StepMaker>& step_makers();

std::unique_ptr<Step> make_input(Line& line);
std::unique_ptr<Step> make_output(Line& line);
std::unique_ptr<Step> make_quantize(Line& line);
std::unique_ptr<Step> make_dequantize(Line& line);
std::unique_ptr<Step> make_requantize(Line& line);

std::unique_ptr<Step> make_conv(Line& line);
std::unique_ptr<Step> make_conv_transpose(Line& line);
std::unique_ptr<Step> make_linear(Line& line);

std::unique_ptr<Step> make_activate(Line& line);
std::unique_ptr<Step> make_binary(Line& line);
std::unique_ptr<Step> make_batch_norm(Line& line);

std::unique_ptr<Step> make_layer_norm(Line& line);
std::unique_ptr<Step> make_rms_norm(Line& line);

std::unique_ptr<Step> make_max_pool(Line& line);
std::unique_ptr<Step> make_avg_pool(Line& line);
std::unique_ptr<Step> make_adaptive_avg_pool(Line& line);
std::unique_ptr<Step> make_mean(Line& line);

std::unique_ptr<Step> make_cat(Line& line);
std::unique_ptr<Step> make_slice(Line& line);
std::unique_ptr<Step> make_shuffle(Line& line);
std::unique_ptr<Step> make_pixel_shuffle(Line& line);
std::unique_ptr<Step> make_pixel_unshuffle(Line& line);
std::unique_ptr<Step> make_upsample(Line& line);
std::unique_ptr<Step> make_resize(Line& line);
std::unique_ptr<Step> make_flatten(Line& line);

}  // namespace qkernels
