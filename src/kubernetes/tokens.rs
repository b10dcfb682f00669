//! Whose a token is, as the API server says.

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::Api;
use kube::api::PostParams;

use super::{Cluster, Error, Found, answer};

impl Cluster {
    /// The user a token is of; `None` if it is of nobody, has expired, or was made for another audience.
    pub async fn user_of_token(&self, token: &str, audience: &str) -> Result<Option<String>, Error> {
        let user = self.review(token, audience).await;
        user.map_err(|found| Error { what: "find out whose a token is".to_owned(), found })
    }

    async fn review(&self, token: &str, audience: &str) -> Result<Option<String>, Found> {
        let reviews: Api<TokenReview> = Api::all(self.client()?);
        let audiences = Some(vec![audience.to_owned()]);
        let spec = TokenReviewSpec { token: Some(token.to_owned()), audiences };
        let asked = TokenReview { spec, ..TokenReview::default() };
        let status = answer(reviews.create(&PostParams::default(), &asked)).await?.status.unwrap_or_default();
        // An API server that does not know of audiences confirms a token for itself, and names none.
        let is_for_us = status.audiences.is_some_and(|audiences| audiences.iter().any(|a| a == audience));
        let user = status.user.and_then(|user| user.username);
        Ok(user.filter(|_| is_for_us && status.authenticated == Some(true)))
    }
}
