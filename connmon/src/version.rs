//! What this build is, for `--version` and `connmon_build_info`.

/// Version of the package.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Git commit, or `unknown`.
pub const REVISION: &str = env!("CONNMON_BUILD_REVISION");
/// Git branch, or `unknown`.
pub const BRANCH: &str = env!("CONNMON_BUILD_BRANCH");
/// Commit date or SOURCE_DATE_EPOCH as RFC 3339, or `unknown`.
pub const BUILD_DATE: &str = env!("CONNMON_BUILD_DATE");
/// Version of rustc.
pub const RUSTC: &str = env!("CONNMON_BUILD_RUSTC");
/// Target triple.
pub const TARGET: &str = env!("CONNMON_BUILD_TARGET");

/// The lines of `--version`, laid out as Prometheus programs do.
pub fn text() -> String {
    format!(
        "connmon, version {VERSION} (branch: {BRANCH}, revision: {REVISION})\n\
         \x20 build date:       {BUILD_DATE}\n\
         \x20 rust version:     {RUSTC}\n\
         \x20 platform:         {TARGET}\n"
    )
}
