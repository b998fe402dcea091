"""cylora inside other libraries. Each module needs the library it is named after; nothing else imports them."""
