-- Version 2: episodes belong to a scope, which datasets and students never leave.
ALTER TABLE episodes ADD COLUMN scope TEXT NOT NULL DEFAULT ''; -- whom it belongs to; empty if the host keeps nobody apart
CREATE INDEX episodes_scope ON episodes (scope);
