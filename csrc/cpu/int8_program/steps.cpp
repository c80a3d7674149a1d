#include "cpu/int8_program/steps.h"

namespace qkernels {
namespace {

std::unique_ptr<Step> declare_quantizer(Line& line) {
  line.define_quantizer();
  return nullptr;
}

std::unique_ptr<Step> declare_equal(Line& line) {
  EqualConstants pair{line.where(), line.constant("a", ConstantKind::any, 1, false),
                      line.constant("b", ConstantKind::any, 1, false)};
  line.plan().equal.push_back(pair);
  return nullptr;
}

}  // namespace

const std::map<std::string, StepMaker>& step_makers() {
  static const std::map<std::string, StepMaker> makers = {{"quantizer", declare_quantizer},
                                                          {"equal", declare_equal},
                                                          {"input", make_input},
                                                          {"output", make_output},
                                                          {"quantize", make_quantize},
                                                          {"dequantize", make_dequantize},
                                                          {"requantize", make_requantize},
                                                          {"conv", make_conv},
                                                          {"conv_transpose", make_conv_transpose},
                                                          {"linear", make_linear},
                                                          {"activate", make_activate},
                                                          {"binary", make_binary},
                                                          {"batch_norm", make_batch_norm},
                                                          {"layer_norm", make_layer_norm},
                                                          {"rms_norm", make_rms_norm},
                                                          {"max_pool", make_max_pool},
                                                          {"avg_pool", make_avg_pool},
                                                          {"adaptive_avg_pool", make_adaptive_avg_pool},
                                                          {"mean", make_mean},
                                                          {"cat", make_cat},
                                                          {"slice", make_slice},
                                                          {"shuffle", make_shuffle},
                                                          {"pixel_shuffle", make_pixel_shuffle},
                                                          {"pixel_unshuffle", make_pixel_unshuffle},
                                                          {"upsample", make_upsample},
                                                          {"resize", make_resize},
                                                          {"flatten", make_flatten}};
  return makers;
}

}  // namespace qkernels
