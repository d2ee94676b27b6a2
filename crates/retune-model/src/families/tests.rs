use retune_engine::spec::{Attention, Function, Mix, NormKind, Order, Positions};

use super::*;

fn read(config: Value) -> Result<Description, Error> {
    describe(&config)
}

fn spec(config: Value) -> ModelSpec {
    read(config).unwrap().spec
}

/// A small llama config with some fields replaced.
fn with(changes: Value) -> Result<Description, Error> {
    let mut config = json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    });
    for (name, value) in changes.as_object().unwrap() {
        config[name] = value.clone();
    }
    read(config)
}

fn refusal(changes: Value) -> String {
    with(changes).err().expect("must be refused").to_string()
}

fn attention(spec: &ModelSpec, layer: usize) -> &Attention {
    spec.decoder.blocks[layer].sub_layers[0].attention().unwrap()
}

fn windows(spec: &ModelSpec) -> Vec<Option<usize>> {
    (0..spec.decoder.blocks.len()).map(|layer| attention(spec, layer).window).collect()
}

fn rows(spec: &ModelSpec, module: &str) -> usize {
    spec.linears().find(|linear| linear.name.ends_with(module)).unwrap().rows
}

#[test]
fn every_family_describes_its_defaults() {
    for family in FAMILIES {
        let spec = spec(json!({"model_type": family.model_types[0], "num_hidden_layers": 2, "n_layer": 2,
            "max_position_embeddings": 64, "rope_parameters": null,
            "rope_scaling": if family.model_types[0] == "ministral3" { json!({"rope_type": "default"}) } else { Value::Null }}));
        assert!(family.model_types.contains(&spec.family), "{}", spec.family);
        assert!(spec.modules().iter().all(|m| m.name() == "lm_head" || m.name().starts_with(family.prefix)));
        if let Some(gguf) = &family.gguf {
            for (name, _) in spec.tensors() {
                assert!(gguf.name(family.prefix, &name).is_some(), "{name}");
            }
        }
    }
}

#[test]
fn missing_fields_take_the_defaults_of_transformers() {
    let Description { spec: llama, tokens, .. } = read(json!({"model_type": "llama"})).unwrap();
    assert_eq!((llama.vocab_size, rows(&llama, "gate_proj"), attention(&llama, 0).keys), (32000, 11008, 32));
    assert_eq!((attention(&llama, 0).head_dim, llama.context, llama.decoder.norm.eps), (128, 2048, 1e-6));
    assert_eq!(tokens, TokenIds { bos: Some(1), eos: vec![2], pad: None });
    assert_eq!(llama.ropes[0].frequencies, retune_engine::spec::frequencies(1e4, 128));
    assert!(!llama.head.tied && llama.linears().all(|linear| !linear.bias) && windows(&llama) == [None; 32]);
    let mistral = spec(json!({"model_type": "mistral"}));
    assert_eq!((rows(&mistral, "up_proj"), attention(&mistral, 0).keys), (14336, 8));
    assert_eq!((windows(&mistral), mistral.context), (vec![Some(4096); 32], 131_072));
    let qwen3 = spec(json!({"model_type": "qwen3"}));
    assert_eq!((qwen3.vocab_size, attention(&qwen3, 0).head_dim, qwen3.context), (151_936, 128, 32_768));
    assert_eq!(qwen3.ropes[0].frequencies, retune_engine::spec::frequencies(1e4, 128));
}

/// Parameter counts as published, by the configurations of the Hub.
#[test]
fn the_sizes_are_those_of_published_models() {
    for (config, parameters) in [
        (json!({"model_type": "gpt2"}), 124_439_808),
        (json!({"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16}), 559_214_592),
        (
            json!({"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
            "num_attention_heads": 8, "num_key_value_heads": 1}),
            2_506_172_416,
        ),
        (json!({"model_type": "gemma2"}), 2_614_341_888),
        (json!({"model_type": "phi3"}), 3_821_079_552),
        (
            json!({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
            "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": true}),
            494_032_768,
        ),
        (
            json!({"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": true}),
            596_049_920,
        ),
        (json!({"model_type": "mistral"}), 7_241_732_096),
    ] {
        assert_eq!(spec(config.clone()).parameters(), parameters, "{config}");
    }
}

#[test]
fn null_is_not_the_same_as_missing() {
    let config = json!({"model_type": "mistral", "sliding_window": null, "num_key_value_heads": null, "head_dim": null,
        "bos_token_id": null, "eos_token_id": null});
    let Description { spec: mistral, tokens, .. } = read(config).unwrap();
    assert_eq!((windows(&mistral), attention(&mistral, 0).keys), (vec![None; 32], 32));
    assert_eq!((attention(&mistral, 0).head_dim, tokens), (128, TokenIds::default()));
    let gemma2 = spec(json!({"model_type": "gemma2", "attn_logit_softcapping": null, "final_logit_softcapping": null}));
    assert_eq!((attention(&gemma2, 0).soft_cap, gemma2.head.soft_cap), (None, None));
}

#[test]
fn several_end_tokens_are_kept() {
    assert_eq!(with(json!({"eos_token_id": [128001, 128009]})).unwrap().tokens.eos, [128001, 128009]);
    assert!(refusal(json!({"eos_token_id": [1, -1]})).contains("eos_token_id"));
    assert_eq!(with(json!({"pad_token_id": -1})).unwrap().tokens.pad, None);
    assert_eq!(read(json!({"model_type": "gemma3", "eos_token_id": [1, 106]})).unwrap().tokens.eos, [1, 106]);
    let inner = json!({"model_type": "gemma3", "text_config": {"eos_token_id": 7}});
    assert_eq!(read(inner).unwrap().tokens, TokenIds { bos: Some(2), eos: vec![7], pad: Some(0) });
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    for name in ["mamba", "gpt_neox", "qwen2_moe"] {
        assert!(refusal(json!({"model_type": name})).contains(name));
    }
    assert!(refusal(json!({"model_type": null})).contains("llama, mistral"));
    assert!(refusal(json!({"hidden_act": "quick_gelu"})).contains("quick_gelu"));
    assert!(refusal(json!({"quantization_config": {"quant_method": "gptq", "load_in_4bit": true}})).contains("gptq"));
    let in_no_bits = json!({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": false}});
    assert!(refusal(in_no_bits).contains("bitsandbytes with load_in_4bit or load_in_8bit"));
    let method = "bitsandbytes";
    for in_bits in [
        json!({"load_in_4bit": true}),
        json!({"load_in_4bit": true, "quant_method": method}),
        json!({"load_in_8bit": true, "load_in_4bit": false, "quant_method": method}),
    ] {
        assert!(with(json!({"quantization_config": in_bits})).is_ok());
    }
    assert!(refusal(json!({"rope_scaling": {"rope_type": "axial", "factor": 2.0}})).contains("axial"));
    assert!(refusal(json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}})).contains("full_attention"));
    assert!(refusal(json!({"partial_rotary_factor": 0.5})).contains("partial_rotary_factor"));
    for (name, value) in [
        ("use_parallel_residual", json!(true)),
        ("alibi", json!(true)),
        ("num_local_experts", json!(8)),
        ("num_experts", json!(64)),
        ("use_bidirectional_attention", json!(true)),
        ("is_causal", json!(false)),
        ("clip_qkv", json!(8)),
        ("logits_scaling", json!(8.0)),
    ] {
        let mut changes = json!({});
        changes[name] = value;
        assert!(refusal(changes).contains(name), "{name}");
    }
    for (model_type, name) in [
        ("mistral", "attention_bias"),
        ("mistral", "mlp_bias"),
        ("phi3", "attention_bias"),
        ("gemma2", "mlp_bias"),
        ("bloom", "apply_residual_connection_post_layernorm"),
        ("gpt2", "add_cross_attention"),
    ] {
        let mut config = json!({"model_type": model_type});
        config[name] = json!(true);
        assert!(read(config).err().unwrap().to_string().contains(name), "{model_type} {name}");
    }
    assert!(
        refusal(json!({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}})).contains("linear")
    );
    let harmless = json!({"something_new": {"a": 1}, "quantization_config": null, "num_experts": 0, "is_causal": true});
    assert!(with(harmless).is_ok());
}

#[test]
fn impossible_values_are_refused_by_field() {
    let huge = 1u64 << 60;
    for (name, value) in [
        ("vocab_size", json!(0)),
        ("vocab_size", json!(huge)),
        ("vocab_size", json!(-1)),
        ("vocab_size", json!("many")),
        ("hidden_size", json!(1.5)),
        ("num_hidden_layers", json!(huge)),
        ("num_hidden_layers", json!(100_000)),
        ("num_key_value_heads", json!(3)),
        ("num_key_value_heads", json!(0)),
        ("head_dim", json!(7)),
        ("head_dim", json!(u32::MAX - 1)),
        ("head_dim", json!(1 << 20)),
        ("rms_norm_eps", json!(0)),
        ("rms_norm_eps", json!(1e-60)),
        ("rope_theta", json!(-1)),
        ("rope_scaling", json!([])),
        ("tie_word_embeddings", json!("yes")),
        ("max_position_embeddings", json!(0)),
    ] {
        let mut changes = json!({});
        changes[name] = value.clone();
        assert!(refusal(changes).contains(name), "{name} {value}");
    }
    assert!(refusal(json!({"num_attention_heads": 0})).contains("num_attention_heads"));
    assert!(refusal(json!({"vocab_size": u32::MAX, "hidden_size": u32::MAX - 3, "head_dim": 8})).contains("memory"));
    assert!(refusal(json!({"rope_scaling": {"type": "linear"}})).contains("factor"));
    assert!(read(json!([1])).is_err());
    for (model_type, name, value) in [
        ("gpt2", "n_head", json!(5)),
        ("gpt2", "n_layer", json!(100_000)),
        ("gpt2", "n_embd", json!(u32::MAX)),
        ("bloom", "n_head", json!(5)),
        ("bloom", "hidden_size", json!(u32::MAX)),
        ("phi3", "intermediate_size", json!(1u64 << 32)),
        ("phi3", "partial_rotary_factor", json!(1.5)),
        ("qwen2", "layer_types", json!(["full_attention"])),
        ("gemma3_text", "sliding_window_pattern", json!(0)),
        ("gemma2", "query_pre_attn_scalar", json!(0)),
        ("gemma2", "attn_logit_softcapping", json!(0.0)),
        ("gemma2", "sliding_window", Value::Null),
    ] {
        let mut config = json!({"model_type": model_type});
        config[name] = value.clone();
        let text = read(config).err().expect(name).to_string();
        assert!(text.contains(name) || text.contains("memory"), "{model_type} {name}: {text}");
    }
}

#[test]
fn windows_follow_the_layers() {
    let qwen2 = |changes: Value| {
        let mut config = json!({"model_type": "qwen2", "hidden_size": 32, "num_attention_heads": 4,
            "num_key_value_heads": 4, "num_hidden_layers": 3});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        windows(&spec(config))
    };
    assert_eq!(qwen2(json!({"sliding_window": 5})), [None; 3]);
    let on = json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 1});
    assert_eq!(qwen2(on), [None, Some(5), Some(5)]);
    let all = json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 0});
    assert_eq!(qwen2(all), [Some(5); 3]);
    let kinds = json!(["sliding_attention", "full_attention", "full_attention"]);
    let listed = json!({"use_sliding_window": true, "sliding_window": 5, "layer_types": kinds});
    assert_eq!(qwen2(listed), [Some(5), None, None]);

    let of = |config: Value| windows(&spec(config));
    let gemma2 = json!({"model_type": "gemma2", "num_hidden_layers": 3, "sliding_window": 7});
    assert_eq!(of(gemma2), [Some(7), None, Some(7)]);
    let gemma3 = json!({"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 7});
    let sixth = [Some(7), Some(7), Some(7), Some(7), Some(7), None, Some(7)];
    assert_eq!(of(gemma3), sixth);
    let wrapped = json!({"model_type": "gemma3", "text_config": {"num_hidden_layers": 7, "sliding_window": 7}});
    assert_eq!(of(wrapped), sixth);
    let scaled = spec(json!({"model_type": "ministral3", "num_hidden_layers": 1}));
    let scale = attention(&scaled, 0).query_scale.unwrap();
    assert_eq!((scale.beta, scale.original, windows(&scaled)), (0.1, 16_384, vec![None]));
    let ministral = json!({"model_type": "ministral", "num_hidden_layers": 2});
    assert_eq!(of(ministral), [Some(4096); 2]);
}

#[test]
fn gemma_3_turns_by_two_bases() {
    let frequencies = |theta| retune_engine::spec::frequencies(theta, 256);
    let ropes = |changes: Value| {
        let mut config = json!({"model_type": "gemma3_text", "num_hidden_layers": 6});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let spec = spec(config);
        assert_eq!(attention(&spec, 0).positions, Positions::Rope(1));
        assert_eq!(attention(&spec, 5).positions, Positions::Rope(0));
        [spec.ropes[0].frequencies.clone(), spec.ropes[1].frequencies.clone()]
    };
    assert_eq!(ropes(json!({})), [frequencies(1e6), frequencies(1e4)]);
    assert_eq!(ropes(json!({"rope_theta": 5e5, "rope_local_base_freq": 5e3})), [frequencies(5e5), frequencies(5e3)]);
    let both = json!({"full_attention": {"rope_type": "default", "rope_theta": 2e6}, "sliding_attention": null});
    assert_eq!(ropes(json!({"rope_parameters": both, "rope_theta": 5e5})), [frequencies(2e6), frequencies(1e4)]);
    let [full, sliding] = ropes(json!({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}));
    assert_eq!((full[1], sliding), (f64::from(frequencies(1e6)[1] as f32 / 8.0), frequencies(1e4)));
    let flat = json!({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}});
    assert!(read(flat).err().unwrap().to_string().contains("rope_parameters.rope_theta"));
}

#[test]
fn gpt_2_may_scale_by_layer() {
    let scales = |changes: Value| {
        let mut config = json!({"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 3});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let spec = spec(config);
        [0, 1, 2].map(|layer| attention(&spec, layer).scale)
    };
    assert_eq!(scales(json!({"reorder_and_upcast_attn": true})), [0.25; 3]);
    assert_eq!(scales(json!({"scale_attn_weights": false})), [1.0; 3]);
    assert_eq!(scales(json!({"scale_attn_by_inverse_layer_idx": true})), [0.25, 0.125, (0.25 / 3.0) as f32]);
    let other_names = json!({"model_type": "gpt2", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3,
        "max_position_embeddings": 9});
    let names = json!({"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 3, "n_positions": 9});
    assert_eq!(spec(other_names), spec(names));
}

#[test]
fn what_families_differ_in() {
    let small = |model_type: &str, changes: Value| {
        let mut config = json!({"model_type": model_type, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8,
            "num_key_value_heads": 2, "num_hidden_layers": 1, "intermediate_size": 48, "vocab_size": 96});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        spec(config)
    };
    let biases = |spec: &ModelSpec| spec.linears().map(|linear| linear.bias).collect::<Vec<_>>();
    let none = [false; 8];
    assert_eq!(biases(&small("qwen2", json!({}))), [true, true, true, false, false, false, false, false]);
    assert_eq!(biases(&small("qwen3", json!({}))), none);
    assert_eq!(
        biases(&small("qwen3", json!({"attention_bias": true}))),
        [true, true, true, true, false, false, false, false]
    );
    let qwen3 = small("qwen3", json!({}));
    assert!(
        attention(&qwen3, 0)
            .qk_norm
            .as_ref()
            .is_some_and(|norms| norms[0].kind == NormKind::Rms && norms[1].width == 8)
    );
    assert!(attention(&small("qwen2", json!({})), 0).qk_norm.is_none());

    let function = |spec: &ModelSpec| match spec.decoder.blocks[0].sub_layers[1].mix {
        Mix::Activation { function, .. } => function,
        Mix::Attention(_) | Mix::Cross(_) => panic!("an attention"),
    };
    let gemma = small("gemma", json!({"hidden_act": "gelu"}));
    assert_eq!((function(&gemma), gemma.table.scale), (Function::GeluTanh, 32f64.sqrt() as f32));
    assert!(gemma.head.tied && gemma.decoder.norm.kind == NormKind::RmsPlusOne);
    let gemma2 = small("gemma2", json!({"query_pre_attn_scalar": 16}));
    assert_eq!((attention(&gemma2, 0).scale, attention(&gemma2, 0).soft_cap), (0.25, Some(50.0)));
    assert!(gemma2.head.soft_cap == Some(30.0) && gemma2.sub_layers().all(|sub_layer| sub_layer.post_norm.is_some()));
    let gemma3 = small("gemma3_text", json!({"attn_logit_softcapping": 50.0}));
    assert_eq!((attention(&gemma3, 0).soft_cap, gemma3.head.soft_cap), (None, None));
    let wrapped = json!({"model_type": "gemma3", "text_config": {"num_hidden_layers": 1, "hidden_size": 32}});
    let wrapped = spec(wrapped);
    assert_eq!(wrapped.table.name, "model.language_model.embed_tokens");
    assert_eq!(wrapped.linears().next().unwrap().name, "model.language_model.layers.0.self_attn.q_proj");
    assert_eq!(wrapped.head.linear.name, "lm_head");

    let phi3 = small("phi3", json!({"partial_rotary_factor": 0.75}));
    assert_eq!((rows(&phi3, "qkv_proj"), rows(&phi3, "gate_up_proj"), phi3.ropes[0].frequencies.len()), (64, 96, 3));
    let bloom = spec(json!({"model_type": "bloom", "hidden_size": 36, "n_head": 3, "seq_length": 7}));
    assert_eq!((attention(&bloom, 0).order, attention(&bloom, 0).positions), (Order::Heads, Positions::Alibi));
    assert_eq!((bloom.context, bloom.hidden_size), (7, 36));
    assert_eq!(spec(json!({"model_type": "bloom", "n_embed": 32, "hidden_size": 64})).hidden_size, 32);
}

#[test]
fn a_text_model_of_another_is_configured_alone() {
    let config = json!({"model_type": "gemma3", "eos_token_id": [1, 106], "dtype": "bfloat16",
        "text_config": {"num_hidden_layers": 2, "hidden_size": 64, "model_type": "gemma3_text"}, "vision_config": {"a": 1}});
    let text = text_config(&config);
    assert_eq!((&text["model_type"], &text["architectures"][0]), (&json!("gemma3_text"), &json!("Gemma3ForCausalLM")));
    assert_eq!((&text["eos_token_id"], &text["dtype"]), (&json!([1, 106]), &json!("bfloat16")));
    assert!(text.get("vision_config").is_none() && text.get("text_config").is_none());
    let (alone, wrapped) = (describe(&text).unwrap(), describe(&config).unwrap());
    assert_eq!((alone.spec.parameters(), alone.tokens), (wrapped.spec.parameters(), wrapped.tokens));
    let other = json!({"model_type": "llama"});
    assert_eq!(text_config(&other), other);
}

#[test]
fn t5_is_an_encoder_and_a_decoder_of_the_published_sizes() {
    let small = spec(json!({"model_type": "t5"}));
    assert_eq!(small.parameters(), 60_506_624);
    let base = json!({
        "model_type": "t5", "d_model": 768, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false, "is_encoder_decoder": true,
    });
    // Without the head of its own, which its file has.
    let flan = spec(base.clone());
    assert_eq!(flan.parameters(), 247_577_856 - 32_128 * 768);
    assert!(flan.decoder.sub_layers().any(|s| s.mix == Mix::Activation { function: Function::GeluTanh, gated: true }));
    // What the old key says of the scale, unless there is the new one.
    let scale = |tied: Option<bool>, scaled: Option<bool>| {
        let mut config = base.clone();
        config["tie_word_embeddings"] = json!(tied);
        config["scale_decoder_outputs"] = json!(scaled);
        let spec = spec(config);
        assert!(spec.head.tied, "the file decides");
        spec.head.scale
    };
    let scaled = 768f64.powf(-0.5) as f32;
    assert_eq!((scale(Some(false), None), scale(None, None), scale(Some(true), None)), (1.0, scaled, scaled));
    assert_eq!((scale(Some(true), Some(false)), scale(Some(false), Some(true))), (1.0, scaled));
    let refused = |key: &str, value: Value| {
        let mut config = base.clone();
        config[key] = value;
        describe(&config).err().map_or_else(|| panic!("{key} is taken"), |error| error.to_string())
    };
    assert!(refused("feed_forward_proj", json!("gated-mish")).contains("\"mish\""));
    assert!(refused("relative_attention_num_buckets", json!(256)).contains("less than twice"));
    assert!(refused("is_encoder_decoder", json!(false)).contains("true, in models of this type"));
    let llama = describe(&json!({"model_type": "llama", "is_encoder_decoder": true})).err().unwrap().to_string();
    assert!(llama.contains("false, in models of this type"), "{llama}");
}
