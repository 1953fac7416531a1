// SPDX-License-Identifier: Apache-2.0
//
// What cni/json.h makes of texts: reads texts from standard input, each behind its length in four bytes of host order,
// and writes a line for each: `no`, or the document in one notation that says every value, strings as hexadecimal UTF-8.
#include "json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct json json;

static void show(json_ref value)
{
    static char room[1 << 20];
    if (value->type == JSON_STRING) {
        putchar('"');
        // One with a NUL is no string of C: it is shown as the text that it is.
        if (!json_copy(&json, value, room, sizeof(room)))
            printf("%.*s", (int)(value->end - value->begin), json.text + value->begin);
        else
            for (const char *at = room; *at; at++)
                printf("%02x", (unsigned char)*at);
        putchar(' ');
    } else if (value->type == JSON_ARRAY || value->type == JSON_OBJECT) {
        putchar(value->type == JSON_ARRAY ? '[' : '{');
        for (json_ref one = json_first(&json, value); one; one = json_next(&json, one))
            show(one);
        putchar(']');
    } else {
        printf("%.*s ", (int)(value->end - value->begin), json.text + value->begin);
    }
}

int main(void)
{
    uint32_t length;
    while (fread(&length, sizeof(length), 1, stdin) == 1) {
        char *text = malloc(length ? length : 1); // of its very size, so that what is read beyond is seen
        if (!text || fread(text, 1, length, stdin) != length)
            return EXIT_FAILURE;
        if (json_parse(&json, text, length)) {
            show(&json.values[0]);
            putchar('\n');
        } else {
            puts("no");
        }
        free(text);
    }
    return EXIT_SUCCESS;
}
