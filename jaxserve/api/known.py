"""Every field that the generation routes know, by what becomes of it."""

from jaxserve.api.fields import names

UNSUPPORTED = names(
    """tools tool_choice functions function_call structured_outputs structural_tag guided_json guided_regex
    guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern prompt_embeds input_embeds
    suffix lora lora_name lora_path lora_request audio prediction web_search_options logits_processors
    logits_processor_pattern bad_words allowed_token_ids use_beam_search early_stopping ec_transfer_params
    vllm_xargs mm_processor_kwargs media_io_kwargs chat_template documents
    reasoning reasoning_effort verbosity thinking_token_budget repetition_detection moderation"""
)
"""Known fields that would change the answer and cannot be honoured: refused unless they ask for nothing."""

NO_EFFECT = names(
    """store service_tier parallel_tool_calls prompt_cache_key prompt_cache_retention safety_identifier
    include_reasoning spaces_between_special_tokens"""
)
"""Known fields that cannot change the answer of this server: accepted."""

COMMON = (
    UNSUPPORTED
    | NO_EFFECT
    | names("""model stream stream_options n best_of max_tokens min_tokens temperature top_k top_p min_p seed
        repetition_penalty presence_penalty frequency_penalty logit_bias stop stop_token_ids ignore_eos
        skip_special_tokens include_stop_str_in_output logprobs prompt_logprobs truncate_prompt_tokens
        return_token_ids return_tokens_as_token_ids cache_salt priority request_id user metadata
        response_format modalities length_penalty add_special_tokens echo kv_transfer_params""")
)
"""Every field that both routes know."""
