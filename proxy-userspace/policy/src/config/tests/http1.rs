//! The options of HTTP/1.1 in Envoy's v3 format and in the native one.

use super::super::{Config, LoadError, parse, to_yaml};
use super::{ENVOY_V3, NATIVE};

const PRESERVE_CASE: &str = "{ stateful_formatter: { name: preserve_case, typed_config: { \"@type\": \
     type.googleapis.com/envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig, \
     forward_reason_phrase: true } } }";

fn read(text: &str) -> Result<Config, String> {
    match parse(text, "file") {
        Ok(loaded) => Ok(loaded.config),
        Err(LoadError::Invalid { problems, .. }) => Err(problems[0].message.clone()),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether the file's listener keeps the case of header names, and the warnings.
fn keeps_case(text: &str) -> (bool, Vec<String>) {
    let config = read(text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let warnings = config.warnings.into_iter().map(|warning| warning.text);
    (config.listeners[0].options.preserve_case, warnings.collect())
}

/// The example with options of its connection manager.
fn downstream(options: &str) -> String {
    ENVOY_V3.replace("codec_type: AUTO", &format!("http_protocol_options: {{ {options} }}"))
}

/// A file with options of its cluster.
fn upstream(file: &str, options: &str) -> String {
    let key = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    let typed = format!(
        "typed_extension_protocol_options: {{ {key}: {{ \"@type\": type.googleapis.com/{key}, \
         explicit_http_config: {{ http_protocol_options: {{ {options} }} }} }} }}"
    );
    file.replace("connect_timeout: 0.25s", &typed)
}

#[test]
fn the_native_format_keeps_the_case_of_header_names_where_it_says_so() {
    let native =
        |value: &str| NATIVE.replace("  routes:", &format!("  header_key_format: {value}\n  routes:"));
    assert!(!keeps_case(NATIVE).0);
    assert!(!keeps_case(&native("lower_case")).0);
    let preserved = native("preserve_case");
    assert!(keeps_case(&preserved).0);
    assert!(keeps_case(&to_yaml(&read(&preserved).unwrap())).0);
    let error = read(&native("proper_case_words")).unwrap_err();
    assert!(error.contains("must be one of lower_case, preserve_case"), "{error}");
}

#[test]
fn the_preserve_case_formatter_of_envoy_is_understood() {
    let format = format!("header_key_format: {PRESERVE_CASE}");
    let by_manager = downstream(&format);
    assert_eq!(keeps_case(&by_manager), (true, vec![]));
    assert_eq!(keeps_case(&upstream(&by_manager, &format)), (true, vec![]));
    assert_eq!(keeps_case(&upstream(ENVOY_V3, "")), (false, vec![]));
}

#[test]
fn the_preserve_case_formatter_of_a_cluster_alone_has_no_effect_and_a_warning() {
    let format = format!("header_key_format: {PRESERVE_CASE}");
    let old_place = format!("http_protocol_options: {{ {format} }}");
    for text in [upstream(ENVOY_V3, &format), ENVOY_V3.replace("connect_timeout: 0.25s", &old_place)] {
        let (keeps, warnings) = keeps_case(&text);
        assert!(!keeps && warnings.len() == 1, "{warnings:?}");
        assert!(warnings[0].contains("header_key_format: has no effect"), "{warnings:?}");
    }
}

#[test]
fn other_formats_of_header_names_are_refused() {
    let other = PRESERVE_CASE.replace("PreserveCaseFormatterConfig", "Other");
    let envoy_headers =
        PRESERVE_CASE.replace("forward_reason_phrase: true", "formatter_type_on_envoy_headers: PROPER_CASE");
    for (format, want) in [
        ("{ proper_case_words: {} }", "Steer writes header names in lower case, or as"),
        (other.as_str(), "Other` is not supported"),
        (envoy_headers.as_str(), "must be one of DEFAULT"),
    ] {
        let format = format!("header_key_format: {format}");
        for text in [downstream(&format), upstream(ENVOY_V3, &format)] {
            let error = read(&text).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }
}

#[test]
fn ignored_upgrades_have_no_effect_unless_they_cover_websocket() {
    let ignore = |matcher: &str| read(&downstream(&format!("ignore_http_11_upgrade: [{matcher}]"))).err();
    for matcher in [
        "{ exact: h2c }",
        "{ prefix: TLS/, ignore_case: true }",
        "{ suffix: /1.2 }",
        "{ contains: h2 }",
        "{ safe_regex: { regex: 'TLS/.*' } }",
        "{ safe_regex: { regex: 'web' } }",
        "{ exact: h2c }, { exact: TLS/1.2 }",
    ] {
        assert_eq!(ignore(matcher), None, "{matcher}");
    }
    for matcher in [
        "{ exact: websocket }",
        "{ exact: WebSocket }",
        "{ prefix: WEB, ignore_case: true }",
        "{ suffix: socket }",
        "{ contains: sock }",
        "{ safe_regex: { regex: '.*' } }",
        "{ safe_regex: { regex: 'WebSocket|h2c' } }",
        "{ exact: h2c }, { exact: websocket }",
    ] {
        let error = ignore(matcher).unwrap_or_default();
        assert!(error.contains("covers websocket"), "{matcher}: {error}");
    }
    for (matcher, want) in [
        ("{}", "must have exactly one of exact, prefix"),
        ("{ exact: a, prefix: b }", "has 2"),
        ("{ custom: {} }", "custom: Steer has no such matchers"),
        ("{ safe_regex: { regex: '(' } }", "bad regex"),
        ("{ prefix: '' }", "must not be empty"),
    ] {
        let error = ignore(matcher).unwrap_or_default();
        assert!(error.contains(want), "{matcher}: {error}");
    }
}
