"""`jrt report`: runs collected into tables and files (`collected`), the page (`html`) and its figures (`plots`)."""
