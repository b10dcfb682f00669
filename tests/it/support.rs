//! What the tests stand on: origins, clients and other processes.

pub(crate) mod api_server;
pub(crate) mod azurite;
pub(crate) mod breaking_proxy;
pub(crate) mod bucket_double;
pub(crate) mod collector;
pub(crate) mod fake_gcs;
pub(crate) mod frames;
pub(crate) mod gated_origin;
pub(crate) mod hostile_origin;
pub(crate) mod hostile_reader;
pub(crate) mod hub;
pub(crate) mod larder;
pub(crate) mod manifests;
pub(crate) mod memory_group;
pub(crate) mod model_origin;
pub(crate) mod moto;
pub(crate) mod node;
pub(crate) mod podman;
pub(crate) mod port_forward;
pub(crate) mod raw_http;
pub(crate) mod real_client;
pub(crate) mod server_process;
pub(crate) mod skip;
pub(crate) mod small_disk;
pub(crate) mod source_contract;
pub(crate) mod web_origin;
