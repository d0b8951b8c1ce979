//! Tests that run the agent on this machine's own kernel. One harness, one
//! file a concern; every agent started here is held to the laws of events
//! and of connections.

mod bytes;
mod crowds;
mod dashboards;
#[path = "../support/devices.rs"]
mod devices;
mod e2e;
mod files;
mod floods;
mod harness;
mod healing;
mod held;
mod hidden;
mod idle;
mod life;
mod load;
#[expect(dead_code, reason = "the walker's tests use more of it")]
#[path = "../namespaces/mod.rs"]
mod namespaces;
mod page;
mod privileges;
mod same_endpoints;
mod stderr;
mod storm;
#[path = "../support/mod.rs"]
mod support;
mod surrogates;
mod terminal;
mod tools;
mod traffic;
#[expect(dead_code, reason = "the page's own tests use more of it")]
#[path = "../browser/webdriver.rs"]
mod webdriver;
mod world;
