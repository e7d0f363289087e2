//! `mmproxyctl` lets any service behind a PROXY-protocol sender see the real client's address.
//!
//! # Map
//!
//! | module | owns | must not know |
//! |---|---|---|
//! | [`cli`] | what can be typed | what it does |
//! | [`commands`] | one file per verb: the order of steps, what a person reads | how a step works |
//! | [`model`] | marks, pathways, instances, addresses as types that cannot be wrong | where they come from |
//! | [`compat`] | the old programs' command lines: words → what they ask for | files, the kernel |
//! | [`config`] | text → model, mistakes with file, line, column | the kernel |
//! | [`socket`] | every socket option there is | connections |
//! | [`pathway`] | rules, routes and CONNMARK: plan, diff, apply, verify | the relay |
//! | [`relay`] | header → spoofed connection → copy both ways | configuration, routing |
//! | [`doctor`] | probes → evidence → verdict (pure) → fix | configuration, how a verdict is shown |
//! | [`resolve`] | the addresses of targets that are names: resolver, container engine | relays, pathways |
//! | [`demo`] | a deployment in miniature, for `mmproxyctl demo` | pathways, relays |
//! | [`import`] | the old programs' units and files → the two files' text | where they are read |
//! | [`edge`] | what belongs into the proxy's own configuration | whether the proxy is there |
//! | [`control`] | the Unix socket of a running process: framing, limits, who may ask | what a request leads to |
//! | [`overview`] | what a process says about its instances and connections | how it is shown |
//! | [`metrics`] | the same for Prometheus, over HTTP | |
//! | [`logging`] | which log lines are written, and in which form | who writes them |
//! | [`supervisor`] | named tasks: start, start again with back-off, drain | what a task is |
//! | [`systemd`] | readiness, stored and passed sockets, watchdog | what they are for |
//! | `causes` | an error with its causes, as one line | who says it |
//! | [`runtime_dir`] | lock files, named by instance and network namespace | what they protect |
//!
//! Dependencies run one way: `commands → {config, pathway, relay} → {socket, model}`; pathway and relay
//! never import each other, and nothing imports commands.
//!
//! # The two flows
//!
//! `pathway add 123`: [`cli`] → [`commands`] → [`config`] → `pathway::plan` (pure: wanted state, diff)
//! → `pathway::netlink` and `pathway::firewall` (apply, read back) → a report.
//!
//! One connection: `relay::worker` (accept) → `relay::setup` (allowed proxy? [`relay::header`], pure) →
//! [`socket`] (spoofed, marked connect to the target of the client's family) → `relay::copy` both ways.

pub mod causes;
pub mod cli;
pub mod commands;
pub mod compat;
pub mod config;
pub mod control;
pub mod demo;
pub mod doctor;
pub mod edge;
pub mod import;
pub mod logging;
pub mod metrics;
pub mod model;
pub mod overview;
pub mod pathway;
pub mod relay;
pub mod resolve;
pub mod runtime_dir;
pub mod socket;
pub mod supervisor;
pub mod systemd;
