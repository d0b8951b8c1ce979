//! A web configuration file: settings, or a refusal that can be shown.
#![no_main]

use std::path::Path;

use connmon_http::webconfig::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(error) = parse(text, Path::new("/fuzz/web.yml")) {
        assert!(!error.to_string().is_empty());
    }
});
