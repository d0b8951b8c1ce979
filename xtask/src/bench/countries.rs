//! A database for many countries on one machine: 127.N.0.0/16 is the N-th.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use mmdb_writer::{Value, Writer};

use crate::exec;

/// 240 alpha-2 codes.
const CODES: &str = "\
ADAEAFAGAIALAMAOAQARASATAUAWAXAZBABBBDBEBFBGBHBIBJBLBMBNBOBQBRBSBTBVBWBYBZCACCCD\
CFCGCHCICKCLCMCNCOCRCUCVCWCXCYCZDEDJDKDMDODZECEEEGEHERESETFIFJFKFMFOFRGAGBGDGEGF\
GGGHGIGLGMGNGPGQGRGSGTGUGWGYHKHMHNHRHTHUIDIEILIMINIOIQIRISITJEJMJOJPKEKGKHKIKMKN\
KPKRKWKYKZLALBLCLILKLRLSLTLULVLYMAMCMDMEMFMGMHMKMLMMMNMOMPMQMRMSMTMUMVMWMXMYMZNA\
NCNENFNGNINLNONPNRNUNZOMPAPEPFPGPHPKPLPMPNPRPSPTPWPYQARERORSRURWSASBSCSDSESGSHSI\
SJSKSLSMSNSOSRSSSTSVSXSYSZTCTDTFTGTHTJTKTLTMTNTOTRTTTVTWTZUAUGUMUSUYUZVAVCVEVGVI";

/// Writes it into the target directory.
///
/// # Errors
/// When the file cannot be written.
pub fn database() -> Result<PathBuf> {
    let mut writer = Writer::new("connmon bench: made-up countries of 127.0.0.0/8");
    // 127.0.0.0/16 stays loopback.
    for (code, n) in CODES.as_bytes().chunks(2).zip(1..=u8::MAX) {
        let network: ipnet::IpNet = format!("127.{n}.0.0/16").parse()?;
        let code = Value::from(std::str::from_utf8(code)?);
        writer
            .insert_value(network, Value::map([("country_code", code)]))
            .with_context(|| format!("database entry {network}"))?;
    }
    let path = exec::target_dir().join("bench.mmdb");
    let bytes = writer.to_bytes().context("cannot build the database")?;
    fs::write(&path, bytes).with_context(|| path.display().to_string())?;
    Ok(path)
}
